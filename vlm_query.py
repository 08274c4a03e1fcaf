"""Ask a vision-language model (VLM) which of two images is closer to a goal, over plain HTTP.

STEP 3 of RL-VLM-F: call 1 shows both images and asks for words, call 2 shows only those words and
asks for a label. One client speaks to OpenAI (and to all who copy its format: Ollama, vLLM,
llama.cpp, LM Studio, SGLang), Gemini and Anthropic.

A label is 0 (first image closer), 1 (second), -1 (the VLM said it cannot tell) or -2 (no label).
Four things are no label, and counted apart: "unreadable" (the answer did not parse), "no answer"
(outage, refusal, cut off, empty), "identical" (never sent) and "limit" (calls or money used up).

Differs from the paper:
  1. Our own wording of the prompts; the official code has no licence.
  2. No temperature is sent: current models refuse it. The cache makes runs repeatable instead.
  3. A failed call is no "-1": it is asked again, then counted as "no answer". Half a batch of
     those stops the run, or a server that answers nobody until the deadline of one question. The
     official client trains on through an expired key.
  4. Pairs that look the same are not sent; the official client pays for them and drops them.
  5. The pairs of a batch are asked side by side, in threads; no result depends on their timing.

Shapes: images (M, H, W, 3) uint8 RGB, labels (M,) int8. `ask` is any callable that takes a list
of str and (H, W, 3) images and returns a Reply; VLM.ask is one.

To use it elsewhere (third line instead: ask = VLM("gemini/MODEL", cache="answers").ask):
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
import io
import ipaddress
import json
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

# ---- STEP 3: ask the VLM which image is closer to the goal ----
ANALYSE = """Both images show the same scene at two different moments. The goal is {goal}.
1. Describe what matters for this goal in Image 1.
2. Describe what matters for this goal in Image 2.
3. How do the two images differ with respect to the goal, and which of them is nearer to it?
"""
ANSWER = """Finish with one last line that holds a single number and nothing else:
0 if Image 1 is closer to the goal, 1 if Image 2 is closer to the goal,
-1 if it cannot be told or makes no difference."""
# For the paper's VLM Score baseline: one image, one number.
SCORE_ANALYSE = """The goal is {goal}. Describe what matters for this goal in the image, and how
far the goal has been reached.
"""
SCORE_ANSWER = """Finish with one last line that holds a single number and nothing else: a decimal
number from 0 (as far from the goal as can be) to 1 (the goal is fully reached)."""
# The second of two calls shows no picture, only what the first one wrote.
NOTES = """Someone looked at a scene with a goal in mind. The goal was {goal}. The notes:
<notes>
{notes}
</notes>
Judge from these notes alone.
"""
SIGHT_GOAL = "to make the picture as bright as possible"  # what check_sight() asks about

# `end` says how an answer ended: "complete", "cut off" (output cap, or still thinking), "refused"
# (by the model or a filter), "empty" (no words in it), or "unreachable: WHY" (retries used up).
Reply = namedtuple("Reply", "text end tokens_in tokens_out cached")


def printable(text):
    """What a terminal may be shown of a stranger's text: "?" for what would steer it or reorder it.

    Kept of the control and format characters: line feed, tab, and what joins letters and emoji.
    """
    keep, steer = "\n\t\u200c\u200d", ("Cc", "Cf", "Cs")  # Cs: half of a pair, cannot be encoded
    return "".join("?" if unicodedata.category(c) in steer and c not in keep else c
                   for c in str(text).replace("\r\n", "\n"))


class VLMError(Exception):
    """Stop asking. One line: what happened, in the provider's words, and what to do."""

    def __init__(self, said):
        super().__init__(" ".join(printable(said).splitlines()))


class LimitReached(VLMError):
    """max_calls or max_usd is used up."""


# Tags around what a model thinks, to be filled in: "/" and "end", or nothing and "begin".
THINK = (r"<{0}(?:seed:)?(?:think|thinking|thought|reasoning)>|<\|{1}_of_thought\|>"
         r"|◁{0}think▷|\[{0}THINK\]")
# What drops out of an answer: the number of an item in a list; </answer>, </s>, <|im_end|>,
# <end_of_turn>, <eos>, [/INST], ```; then Markdown, quotes, brackets and LaTeX.
# trap: "[ ] 1" is a box that is not ticked, and "~~1~~" is crossed out: these stay, and spoil.
ITEM = r"(?m)^[ \t*]*\d+[.)][ \t*]+(?=[^\W\d])"
TOKEN = (r"</\w+>|<[|｜](?!image)[^<>\n]*[|｜]>|<(?i:end_of_\w+|eo[st]|pad)>|\[/INST\]"
         r"|```(?:[a-z]\w*)?")
FRAME = r"""\\(?:boxed|text(?:bf)?|mathbf)|[*`$'"“”‘’«»\\]|[(\[{（【「『](?!\s*[\])}])|[)\]}）】」』]"""
# What stands for a minus sign: dashes of all kinds, and two words.
MINUS = r"[\u2010-\u2015\u2212\u207b\u2796\ufe63\uff0d]|\b(?i:minus|negative)\s+(?=1\b)"
# "Image 2 is closer to the goal than Image 1": the one thing about images that is understood.
CLOSER = r"""(?xi) \b(?:(?:since|because)[ ])? (?:image|picture)[ #]*([12])[ ]
    (?:(?:is|looks|seems|clearly|much|slightly|far|a[ ]bit)[ ])* (?:closer|nearer|better|wins)\b
    (?:[ ]to[ ]the[ ]goal)? (?:[ ]than[ ](?:image|picture)[ #]*[12]\b)? [:,.]?[ ]?"""
# A line that says a number and nothing of an image. OWN: a word for this kind of number.
LINE = r"""(?xi) (?:\#+[ ])? (?:
      (?:so|thus|therefore|hence)[,:]?[ ]
    | (?:i[ ]?a?m[ ])? (?:[5-9]\d|100)%[ ](?:sure|certain|confident)[,:]?[ ]
    | (?:(?:the|my|final|last|correct)[ ])* (?:answer|number|result|output|response|final|OWN
      |antwort|réponse|respuesta|risposta|resposta|ответ|答案|回答|答え) (?:[ ]is:?[ ]|[ ]?[:=：][ ]?) )*
    (?: (-?\d+(?:\.\d+)?) (?:[ ]\1)* )? [ .,;!。]*"""


def after_thinking(text):
    """What stands after the last </think> or its like; "" if the thinking never ended."""
    text = re.split(THINK.format("/", "end"), text)[-1]
    return "" if re.search(THINK.format("", "begin"), text) else text


def only_number(text, own):
    """The number in the last line that holds any word, as it is written, or None. own: see LINE.

    trap: "Bild 1", "Option 1", "Closer: 1" name the first image, and the label 1 is the second
    one. No list of such names is ever complete, so what LINE does not describe is not read.

    Worked example: "**Image 2** is better, so the answer is: `1`.</s>"
      TOKEN and FRAME drop out:    "Image 2 is better, so the answer is: 1."
      CLOSER is noted as a 1:      "so the answer is: 1."
      LINE takes "so ", "the answer is: ", the number 1 and the full stop -> "1"
    "Image 1 is better: 1" says 0 and 1: None. "Bild 1": LINE knows no "Bild": None.
    """
    # Digits of all scripts become ours; characters of no width (category Cf) go.
    text = "".join(str(unicodedata.decimal(c, c)) for c in after_thinking(text)
                   if unicodedata.category(c) != "Cf")
    text = re.sub(MINUS, "-", text)
    for dropped in (ITEM, TOKEN, FRAME):
        text = re.sub(dropped, "", text)
    text = re.sub(r"<(\w+)>", r"\1: ", text).replace("_", " ")  # <answer>1 is answer: 1
    text = "\n".join(" ".join(line.split()) for line in text.splitlines() if re.search(r"\w", line))
    # A heading speaks of the next line: up to five words, or what ends with a colon, a "?", "is".
    heading = r"(?m)(?:^(#.*|[^\W\d]+(?:[:：,]? [^\W\d]+){0,4})|[:：?？=]| is)\n"
    text = re.sub(heading, r"\1: ", text)
    *lines, last = text.splitlines() or [""]
    last = re.sub(r"^.*[:：] ?(?=-1\b)", "", last)  # "They look alike: -1" can mean no image
    number, said = None, set()
    for line in (*lines, last):
        shape = re.fullmatch(LINE.replace("OWN", own), re.sub(CLOSER, "", line))
        number = shape and shape[1]
        if shape:
            said.update(float(image) - 1 for image in re.findall(CLOSER, line))
            said.update([float(number)] if number else [])
    # trap: after a line "0", a lone "1" is its confidence, a footnote, or a change of mind.
    return number if len(said) == 1 else None


def parse_label(text):
    """The last line of an answer -> 0, 1, -1, or None where it could mean anything else.

    "**0**" -> 0    "100% sure: 1" -> 1    "Image 1 wins: 0" -> 0    "<think>1</think>0" -> 0
    "0.5" -> None   "0 or 1" -> None       "Image 1." -> None        "0, then in a line: 1" -> None
    """
    return {"0": 0, "1": 1, "-1": -1}.get(only_number(text, "label"))


def parse_score(text):
    """The last line -> its number in [0, 1], or None: "Score: 0.7" -> 0.7, "70", "7/10" -> None."""
    number = only_number(text, "score|rating")
    return float(number) if number and "-" not in number and float(number) <= 1 else None


# ---- the wire: what each provider wants to read and what it writes ----
def png_base64(image):
    """(H, W, 3) uint8 -> base64 of a PNG: lossless, and the same bytes for the same picture."""
    png = iio.imwrite("<bytes>", image, extension=".png", compress_level=1)
    return base64.b64encode(png).decode()


def counted(tokens):
    """What a server says of its tokens -> int; 0 for what is no number."""
    number = isinstance(tokens, (int, float)) and 0 <= tokens < 1e12
    return int(tokens) if number else 0


def openai_read(data):
    """The answer's JSON -> text, end, tokens in, tokens out; so do the next two.

    trap: "choices": [] and its likes cost tokens too.  "failed": ends that no documentation of the
    provider knows, such as OpenRouter's "error" and vLLM's "abort": the server's fault.
    Those who copy the format have other words for a whole answer, or none: null, "", left out.
    """
    choice, usage = (data.get("choices") or [{}])[0], data.get("usage") or {}
    message, reason = choice.get("message") or {}, str(choice.get("finish_reason") or "").lower()
    whole = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed", "")
    cut_off = ("length", "max_tokens", "model_length", "tool_calls", "function_call")
    ends = {**dict.fromkeys(whole, "complete"), **dict.fromkeys(cut_off, "cut off"),
            "content_filter": "refused"}
    text, refusal = message.get("content"), message.get("refusal")
    places = [key for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
    if isinstance(text, list):  # of parts, some of them thoughts
        kinds = [part.get("type", "text") for part in text]
        places += [kind for kind in kinds if kind in ("thinking", "reasoning")]
        text = "".join(part.get("text") or "" for part, kind in zip(text, kinds)
                       if kind in ("text", "output_text"))
    end = "refused" if refusal else ends.get(reason, "failed")
    if places and end in ("complete", "cut off") and not (text or "").strip():
        end = "empty" if end == "complete" else end
        end += (f" (all of the text is in {places[0]}: turn thinking off, allow more tokens, or "
                "mend the server's reasoning parser)")
    return text or refusal, end, usage.get("prompt_tokens"), usage.get("completion_tokens")


def gemini_read(data):
    blocked = (data.get("promptFeedback") or {}).get("blockReason")  # then no candidates at all
    answer = {"finishReason": blocked} if blocked else (data.get("candidates") or [{}])[0]
    cut_off = ("MAX_TOKENS", "MALFORMED_RESPONSE", "CONTINUATION", "LANGUAGE")
    ends = {"STOP": "complete", None: "failed", **dict.fromkeys(cut_off, "cut off")}
    parts = (answer.get("content") or {}).get("parts") or []  # may be missing when cut off
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    usage = data.get("usageMetadata") or {}
    # trap: thinking is billed as output but counted apart.
    out = sum(counted(usage.get(kind)) for kind in ("candidatesTokenCount", "thoughtsTokenCount"))
    end = ends.get(answer.get("finishReason"), "refused")  # many reasons, all of them refusals
    return text, end, usage.get("promptTokenCount"), out


def anthropic_read(data):
    ends = {"end_turn": "complete", "refusal": "refused", **dict.fromkeys(
        ("max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use", "pause_turn"),
        "cut off")}
    end = ends.get(data.get("stop_reason"), "failed")
    blocks = data.get("content") or []
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    usage = data.get("usage") or {}
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return text, end, sum(counted(usage.get(kind)) for kind in kinds), usage.get("output_tokens")


# url: the official one; who has one needs a key, from the environment.  text, image: one part of
# a question as JSON.  body: the whole.  {key} and {model} are filled in by VLM.
Provider = namedtuple("Provider", "url path variable headers text image body read")
PROVIDERS = {
    "openai": Provider(
        "https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY",
        {"Authorization": "Bearer {key}"}, lambda text: {"type": "text", "text": text},
        lambda data: {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}},
        # No output cap: left out, it is the model's own, and thinking counts against it.
        lambda model, content: {"model": model,
                                "messages": [{"role": "user", "content": content}]}, openai_read),
    "gemini": Provider(
        "https://generativelanguage.googleapis.com/v1beta", "/models/{model}:generateContent",
        # trap: Gemini also takes ?key=..., which ends up in logs and error messages.
        "GEMINI_API_KEY", {"x-goog-api-key": "{key}"}, lambda text: {"text": text},
        # trap: some gateways drop camelCase "inlineData" silently and answer from the text alone.
        lambda data: {"inline_data": {"mime_type": "image/png", "data": data}},
        lambda model, content: {"contents": [{"role": "user", "parts": content}]}, gemini_read),
    "anthropic": Provider(
        "https://api.anthropic.com/v1", "/messages", "ANTHROPIC_API_KEY",
        {"x-api-key": "{key}", "anthropic-version": "2023-06-01"},
        lambda text: {"type": "text", "text": text},
        # trap: the declared type is compared with the bytes; a PNG called image/jpeg is a 400.
        lambda data: {"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": data}},
        # trap: max_tokens must be given, and thinking counts against it: do not be thrifty.
        lambda model, content: {"model": model, "max_tokens": 8192,
                                "messages": [{"role": "user", "content": content}]},
        anthropic_read)}
PROVIDERS["local"] = PROVIDERS["openai"]._replace(url=None, variable="LOCAL_API_KEY")
PROVIDERS["offline"] = PROVIDERS["local"]

# ---- errors: which of them pass, how long to wait, what to tell the user ----
QUOTA_GONE = r'insufficient_quota|billing_hard_limit|enforced_spend_limit|"quotaId": "\w*PerDay'
# What an error body under HTTP 200 would have said as a status; any other is treated like a 500.
ERROR_STATUS = {"authentication_error": 401, "permission_error": 403, "not_found_error": 404,
                "invalid_request_error": 400, "billing_error": 402, "rate_limit_error": 429}
CURE = {401: "check the key", 403: "check the key and what it may use",
        402: "check the plan and the spend limit", 404: "check the model's name and the URL",
        405: "check the URL", 501: "check the URL",
        429: "the quota is used up, waiting does not help: check the plan, then go on"}


def error_in(raw):
    """Body -> the error it holds as a dict {message, code, ...}, {} if it holds none."""
    try:
        data = json.loads(raw)
        data = data[0] if isinstance(data, list) else data  # Gemini: sometimes in a list
        error = data.get("error") or data.get("detail") or data.get("type") == "error"
        return error if isinstance(error, dict) else {"message": str(error)} if error else {}
    except (ValueError, IndexError, AttributeError, RecursionError):
        # no JSON, or none that a provider sends
        # trap: on a long page of <title> without an end the search would take hours
        page = re.search(r"(?is)<title>(.*?)</title>", raw[:10_000])
        return {"message": page.group(1) if page else raw or "(nothing)"}


def filtered(error):
    """Is this error a refusal, dressed as one?"""
    return str(error.get("code", "")).startswith(("content_filter", "content_policy"))


def wait_wished(headers, error):
    """Seconds the server asked to wait, or None. A header, or Gemini's retryDelay: "34s"."""
    details = error.get("details") if isinstance(error.get("details"), list) else []
    delays = [str(d["retryDelay"]).rstrip("s") for d in details
              if isinstance(d, dict) and "retryDelay" in d]
    wish = headers.get("retry-after", delays[0] if delays else "")
    finer = headers.get("retry-after-ms", "")  # the same wish to the millisecond, from OpenAI
    try:
        if re.fullmatch(r"\d+(\.\d+)?", finer):
            return float(finer) / 1000
        # trap: floats are in use, and urllib3's own Retry raises on them; so are dates.
        if re.fullmatch(r"-?\d+(\.\d+)?", wish):
            return max(0.0, float(wish))
        return max(0.0, email.utils.parsedate_to_datetime(wish).timestamp() - time.time())
    except Exception:  # what a stranger calls a date may raise anything
        return None


def merged(body, extra):
    """extra laid over body, dict by dict, so that a setting leaves its neighbours alone."""
    both = {k: merged(body[k], v) if isinstance(v, dict) and isinstance(body.get(k), dict) else v
            for k, v in extra.items()}
    return {**body, **both}


# ---- answers on disk ----
def write_answer(file, raw):
    """Keep the body of an answer, so that nobody pays for it again. VLMError if it cannot be."""
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
    """The body that was kept, or None; a torn file counts as none, so it is asked again."""
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
    """Hold the right to ask what `file` will answer: others, also other processes, wait for it.

    Two pairs may lead to the same second question at the same moment, and two runs beside each
    other ask much the same: each question is paid for once.
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
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies lets go
                # trap: who held it before has removed it, and a lock on nothing locks nobody out
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


# ---- one request ----
LARGEST = 4 << 20  # bytes of an answer, packed or unpacked; a long one has a hundredth of that


class OneClock(io.RawIOBase):
    """What a socket receives, with one clock and one limit for all of it.

    trap: the timeout of requests is for one read of the socket. A server that drips a byte a
    second, of its header, of the size of a chunk, of "100 Continue" for ever, never meets it.
    """

    def __init__(self, stream, sock):
        self.stream, self.sock, self.room = stream, sock, LARGEST
        self.end = time.monotonic() + sock.gettimeout()

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer drips")
        self.sock.settimeout(left)
        count = self.stream.readinto(buffer)
        self.room -= count
        if self.room < 0:
            raise OSError(f"an answer of more than {LARGEST:,} bytes")
        return count

    def close(self):
        self.stream.close()
        super().close()


class ClockedResponse(http.client.HTTPResponse):
    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(OneClock(self.fp.detach(), sock))


class Adapter(requests.adapters.HTTPAdapter):
    """Connections, direct or through a proxy, whose answers have one clock."""

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if pool.ConnectionCls.response_class is not ClockedResponse:
            pool.ConnectionCls = type("Clocked", (pool.ConnectionCls,),
                                      {"response_class": ClockedResponse})
        return pool


def is_loopback(host):
    """This machine by any of its names: localhost, 127.0.0.1, 127.1, ::1, 0.0.0.0, ::, ..."""
    names = r"(.*\.)?localhost(\.localdomain)?\.?|localhost[46]|ip6-l(ocalhost|oopback)"
    if re.fullmatch(names, host):
        return True
    with contextlib.suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))  # "127.1" and "0" are addresses too
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def spellings(key):
    """A pattern for a key however it is quoted: as it is, in a URL, in JSON, anywhere in base64."""
    forms = {key, quote(key, safe=""), json.dumps(key)[1:-1]}
    for before in range(3):  # bytes before it, of three that make four characters
        code = base64.b64encode(bytes(before) + key.encode()).decode()
        code = code[-(-8 * before // 6):8 * (before + len(key)) // 6]  # what depends on it alone
        forms |= {code, code.replace("+", "-").replace("/", "_")}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.I)


def warn(text):
    """A line on stderr; beside a progress bar, above it."""
    bar = sys.modules.get("tqdm")
    (bar.tqdm.write if bar else print)(printable(text), file=sys.stderr)


class Turns:
    """How many requests may be on their way at once: 1 at first, at most `most`.

    A server that answers one at a time lets the others wait; behind seven they would time out,
    again and again, and be computed in vain. So, as in TCP: half as many after one that timed out,
    and one more after an answer that took less than half of its time (another one in the queue
    would then have been answered too). What was asked under an earlier limit changes nothing.
    """

    def __init__(self, most):
        self.most, self.limit, self.taken, self.free = most, 1, 0, threading.Condition()

    def take(self, stop):
        """Wait for a turn -> the limit under which it was given."""
        with self.free:
            while self.taken >= self.limit and not stop.is_set():
                self.free.wait(0.2)  # not for ever: nobody tells us of a stop
            if stop.is_set():
                raise TimeoutError("stopped")
            self.taken += 1
            return self.limit

    def give_back(self, limit, quick, late):
        with self.free:
            self.taken -= 1
            if limit == self.limit:
                self.limit = max(1, limit // 2) if late else min(self.most, limit + quick)
            self.free.notify_all()


MOST_WORKERS = 256
HTTP_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError)
TOO_LATE = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError)


class Silence(TimeoutError):
    """Nobody had an answer since the question was asked: it is the server, not the question."""


class VLM:
    """One model behind one URL. Safe to call from several threads.

    name: "openai/MODEL", "gemini/MODEL", "anthropic/MODEL", "local/MODEL" or "offline".
    url: base of the server, where not the official one.  key: by default from the environment.
    cache: a folder.  workers: requests at the same time, at most.  extra: merged into every body.
    timeout: seconds (to connect, for the whole answer).
    deadline: seconds; no try begins after it.  waits: called with True when the server begins to
    fail us, with False when it answers again.
    usd_per_mtok: dollars per million tokens (in, out), for usd and max_usd.
    The totals count every answer used, also those from the cache, so that a repeated or resumed
    run meets its limits at the same pair; cached_calls were free.
    """

    soon = 15  # seconds for a server that is not there, or no VLM's, and never answered before
    backoff = 1.0  # seconds; full jitter: wait random() * min(60, 2**try) * backoff
    block = 16  # with max_usd, so many questions are asked before the money is counted again
    TOTALS = ("calls", "cached_calls", "tokens_in", "tokens_out")

    def __init__(self, name, url=None, key=None, cache=None, workers=8, max_calls=None,
                 timeout=(10, 120), extra=None, max_usd=None, usd_per_mtok=None, deadline=300):
        provider, _, model = name.partition("/")
        if provider not in PROVIDERS:
            raise VLMError(f"unknown VLM {name!r}: use one of {', '.join(PROVIDERS)}, then /MODEL")
        self.wire, self.name = PROVIDERS[provider], name
        self.model = model or ("stand-in" if provider == "offline" else "")
        base = (url or self.wire.url or "").rstrip("/")
        try:  # no user, no query: no secrets
            shape = re.fullmatch(r"https?://[^/@?\s]+(/[^@?\s]*)?", base)
            usable = shape and (urlsplit(base).port, requests.Request("POST", base).prepare())
        except ValueError:  # a port that is none, half an IPv6 address
            usable = False
        if not usable:
            raise VLMError(f"{name} needs its server's URL, such as http://localhost:11434/v1")
        if not self.model:
            raise VLMError(f"name the model too: {name}/MODEL")
        if not 1 <= workers <= MOST_WORKERS:
            raise VLMError(f"workers must be 1 to {MOST_WORKERS}, not {workers}")
        if max_usd is not None and usd_per_mtok is None:
            raise VLMError("max_usd needs usd_per_mtok: dollars per million tokens (in, out)")
        self._key = (key or os.environ.get(self.wire.variable) or "").strip()
        # trap: requests quotes a header it cannot send, key included, in its own error message.
        if not re.fullmatch("[!-~]*", self._key) or (self.wire.url and not self._key):
            raise VLMError(f"{name} needs a key, without spaces: set {self.wire.variable}")
        self.url = base + self.wire.path.format(model=self.model)
        # A short key is a dummy, and may be a word of any answer.
        self._secret = spellings(self._key) if len(self._key) >= 8 else None
        self.extra, self.timeout, self.deadline = extra or {}, timeout, deadline
        self.max_calls, self.max_usd, self.usd_per_mtok = max_calls, max_usd, usd_per_mtok
        self.cache = Path(cache) if cache else None
        if cache:
            try_folder(self.cache)
        self.load_state_dict(dict.fromkeys(self.TOTALS, 0))
        self._lock, self._not_before, self._turns = threading.Lock(), 0.0, Turns(workers)
        self._heard = self._warned = self._waiting = False  # ever an answer; ever a failed try; now
        self._silent_since = None  # when the first try began that came after the last answer
        self.waits = lambda waiting: None
        self._session = requests.Session()
        self._session.headers["Content-Type"] = "application/json"
        for header, value in self.wire.headers.items() if self._key else ():
            self._session.headers[header] = value.format(key=self._key)
        # trap: a ~/.netrc entry for the host would replace our Authorization header.
        self._session.auth = lambda request: request
        # trap: a proxy named in the environment would be asked for localhost as well.
        self._session.trust_env = not is_loopback(urlsplit(base).hostname)
        # trap: a cookie more with each answer, all sent with each question: too much for a server.
        self._session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        # trap: following a redirect would turn the POST into a GET and hand the key to a stranger;
        # and requests reads the body of one that it does not follow, whatever its size.
        self._session.get_redirect_target = lambda response: None
        for scheme in ("http://", "https://"):  # the default pool keeps 10 connections
            self._session.mount(scheme, Adapter(pool_maxsize=workers))

    def state_dict(self):
        """Running totals, for a checkpoint."""
        return {name: getattr(self, name) for name in self.TOTALS}

    def load_state_dict(self, totals):
        vars(self).update(totals)

    @property
    def usd(self):
        """What the answers used so far cost, or None without a price."""
        price = self.usd_per_mtok
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6 if price else None

    def room(self, calls_each=1):
        """How many questions, of so many calls each, may be asked before limits are met again."""
        calls = sys.maxsize if self.max_calls is None else max(0, self.max_calls - self.calls)
        if self.max_usd is None:
            return calls // calls_each
        return min(calls // calls_each, self.block) if self.usd < self.max_usd else 0

    def ask(self, parts):
        """parts: list of str | (H, W, 3) uint8 -> Reply. Raises LimitReached, VLMError."""
        if not self.room():
            raise LimitReached(f"max_calls {self.max_calls} or max_usd {self.max_usd} is used up")
        return self.answer(parts)

    def answer(self, parts, deadline=None, stop=None):
        """ask() without its limits. stop: a threading.Event; once it is set, no try begins, and
        with it a server that is silent is a VLMError, not an answer that is missing.
        """
        body, file = self._question(parts)
        stopped, cached = stop or threading.Event(), self._kept(file)
        try:
            with alone(file, stopped) if file and not cached else contextlib.nullcontext():
                read = cached = cached or self._kept(file)  # whom we waited for may have got it
                if not cached:
                    raw = self._send(body, deadline or self.deadline, stopped)
                    read = self._read(raw)
                    # Refused and cut-off answers were paid for, so are kept too; a server's
                    # failures not.
                    if file and not read[1].startswith(("empty", "failed")):
                        write_answer(file, raw)
        except TimeoutError as error:
            if stop and isinstance(error, Silence):
                raise VLMError(f"{self.name} gives no answer: {error}") from None
            if not stop:
                self._silent_since = None  # who asks later begins a new clock
            return Reply("", f"unreachable: {error}", 0, 0, False)
        text, end, *tokens = read
        if self.max_usd is not None and end == "complete" and not any(tokens):
            raise VLMError(f"{self.name} does not say how many tokens it used, so max_usd "
                           "cannot be kept: use max_calls")
        with self._lock:
            for name, more in zip(self.TOTALS, (1, bool(cached), *tokens)):
                setattr(self, name, getattr(self, name) + more)
        return Reply(text, end, *tokens, bool(cached))

    def forget(self, parts):
        """Remove the kept answer of this question, so that the next ask() asks anew."""
        file = self._question(parts)[1]
        if file:
            file.unlink(missing_ok=True)

    def _question(self, parts):
        """-> its body, and the file that its answer is kept in (None without a cache)."""
        content = [self.wire.text(part) if isinstance(part, str) else
                   self.wire.image(png_base64(part)) for part in parts]
        body = json.dumps(merged(self.wire.body(self.model, content), self.extra)).encode()
        # trap: the stand-in gets another port at each start; its model name says all that matters
        # (but for plain "offline", which names no model).
        where = "offline" if self.name.startswith("offline/") else f"{self.name}\n{self.url}"
        key = hashlib.sha256(where.encode() + b"\n" + body).hexdigest()
        return body, self.cache and self.cache / f"{key}.json"

    def _kept(self, file):
        """What _read() makes of the kept answer; None for what we would not have kept."""
        raw = read_answer(file)
        error = error_in(raw) if raw else {}
        if raw and (not error or filtered(error)):
            read = self._read(self._redacted(raw))
            return None if read[1].startswith(("empty", "failed")) else read

    def _read(self, raw):
        """Body of an answer -> (text, end, tokens in, tokens out)."""
        try:
            data = json.loads(raw)
            if data.get("error"):
                return "(filtered)", "refused", 0, 0  # _judge let no other error through
            text, end, tokens_in, tokens_out = self.wire.read(data)
        except (KeyError, IndexError, TypeError, AttributeError):
            return "", "empty", 0, 0  # such as "choices": "none"
        # trap: half an emoji ("\ud83d") is legal JSON, but can be neither printed nor written.
        text = text.encode(errors="replace").decode() if isinstance(text, str) else ""
        if end in ("complete", "failed") and not after_thinking(text).strip():
            end = "cut off" if text.strip() else "empty"  # cut off: all of it was thinking
        return text, end, counted(tokens_in), counted(tokens_out)

    def _send(self, body, deadline, stop):
        """POST until there is an answer -> its body. TimeoutError; VLMError if hopeless."""
        asked = time.monotonic()
        give_up, moment, why = asked + deadline, 0.0, "told to wait"
        for tries in range(10_000):
            try:
                # trap: a server that always says "0 seconds" leaves nothing to wait for, and no end
                if tries and time.monotonic() > give_up:
                    raise TimeoutError(f"{why}, {tries} tries; past the deadline")
                self._wait(moment, give_up, stop, f"{why}, {tries} tries")
                queued = time.monotonic()
                turn = self._turns.take(stop)
            except TimeoutError as error:
                silent = tries and not stop.is_set() and self._silent(asked)
                raise (Silence if silent else TimeoutError)(str(error)) from None
            began, status, wish, quick, late = time.monotonic(), None, None, False, False
            give_up += began - queued  # the queue does not count
            asked = asked if tries else began
            with self._lock:
                self._silent_since = self._silent_since or began
            try:
                status, headers, raw = self._post(body)
                why, wish = self._judge(status, headers, raw)
                if not why:
                    quick = time.monotonic() - began < self.timeout[1] / 2
                    self._mark("")
                    return raw
            # trap: while the body is read, errors of urllib3 come through, not those of requests.
            except HTTP_ERRORS as error:
                late = isinstance(error, TOO_LATE)
                why = self._reason(error, late)
            finally:
                self._turns.give_back(turn, quick, late)
            self._mark(why)
            now = time.monotonic()
            if self._silent(now - deadline):
                give_up = 0.0  # the others have waited long enough: for all it is over
            elif not self._heard and not late and status in (None, 200):
                give_up = min(give_up, asked + self.soon)
            # Full jitter spreads the threads; a fixed wait would send them all at once again.
            wait = random.random() * min(60, 2 ** min(tries, 6)) * self.backoff
            moment = now + (wish or wait)  # a wish for 0 seconds is none
            if status == 429 or wish is not None:  # one was told to slow down: all slow down
                with self._lock:
                    self._not_before = max(self._not_before, moment)

    def _silent(self, moment):
        """Has nobody had an answer since that moment, though somebody asked?"""
        since = self._silent_since
        return since is not None and since <= moment

    def _mark(self, why):
        """Keep the books of failed tries (why) and answers (""). The first failure is shown."""
        with self._lock:
            turn, first = self._waiting != bool(why), why and not self._warned
            self._waiting, self._warned = bool(why), self._warned or bool(why)
            if not why:
                self._heard, self._silent_since = True, None
        if first:
            warn(f"waiting for the server: {why}")
        if turn:
            self.waits(bool(why))

    def _reason(self, error, late):
        """What an exception means, in one line: requests hides it in the innermost of a chain."""
        if late:
            return f"no answer from {self.url} within {self.timeout[1]:g} s (--timeout)"
        while isinstance(error, HTTP_ERRORS) and (inner := error.__cause__ or error.__context__):
            error = inner
        said = " ".join(self._redacted(str(error)).split())[:300]
        return f"no answer from {self.url} ({said})"

    def _wait(self, moment, give_up, stop, why):
        """Sleep until the moment, or until the one before which no thread may ask, if later."""
        while (left := max(moment, self._not_before) - time.monotonic()) > 0:
            if time.monotonic() + left > give_up:
                raise TimeoutError(f"{why}; {left:.0f} s more is past the deadline")
            stop.wait(left)
            if stop.is_set():
                break
        if stop.is_set():
            raise TimeoutError("stopped")

    def _post(self, body):
        """-> (status, headers, body text)"""
        pieces, room = [], LARGEST
        with self._session.post(self.url, body, stream=True, timeout=self.timeout,
                                allow_redirects=False) as response:
            # trap: a few kilobytes can unpack to gigabytes. So the body is read piece by piece.
            while piece := response.raw.read1(65536, decode_content=True):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise requests.RequestException(f"an answer of more than {LARGEST:,} bytes")
            raw = self._redacted(b"".join(pieces).decode("utf-8", "replace"))
            return response.status_code, response.headers, raw

    def _redacted(self, raw):
        """A body without the key: some servers quote what they were sent. The one door for it."""
        if not self._secret:
            return raw
        if re.search(r"\\u00[2-7]|\\/", raw):  # JSON can write any letter of a key as a number
            with contextlib.suppress(ValueError, RecursionError):
                raw = json.dumps(json.loads(raw))
        return self._secret.sub("[key]", raw)

    def _judge(self, status, headers, raw):
        """-> ("", None): an answer; (why, seconds wished or None): ask again; else VLMError."""
        error = error_in(raw)
        code, kind = str(error.get("code", "")), str(error.get("type", ""))
        if (status == 400 and filtered(error)) or (status == 200 and not error):
            return "", None
        said = " ".join(str(error.get("message") or raw)[:3000].split())[:300]
        if status == 200 and raw.lstrip().startswith("<"):
            raise VLMError(f"{self.url} answered with a web page ({said}): check the URL")
        if status == 200:
            named = re.fullmatch("[45][0-9]{2}", code)
            status = int(code) if named else ERROR_STATUS.get(kind, 200)
        why = f"HTTP {status} from {self.url}: {said}"
        status = 500 if status == 200 else status
        gone = status == 429 and re.search(QUOTA_GONE, json.dumps(error))
        if not gone and (status in (408, 409, 425, 429) or status >= 500) and status != 501:
            return why, wait_wished(headers, error)
        cure = CURE.get(status, "check the URL" if status < 400 else "change what it refuses")
        raise VLMError(f"{why} - {cure}")

    def check_sight(self):
        """Black against white, in both orders: did both pictures arrive, in that order?

        A server that drops pictures, a text-only model, a truncated context: all answer something.
        Two calls at each start, never from the cache: the server may be another one, or cured.
        On resume, call it before load_state_dict(): the totals loaded include it.
        """
        cache, self.cache = self.cache, None
        try:
            self._check_sight()
        finally:
            self.cache = cache

    def _check_sight(self):
        black, white = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), 255, np.uint8)
        for first, second, right in ((black, white, 1), (white, black, 0)):
            parts = ["Image 1:", first, "Image 2:", second,
                     (ANALYSE + ANSWER).format(goal=SIGHT_GOAL)]
            reply = self.answer(parts, deadline=min(120, self.deadline))
            if reply.end != "complete":
                raise VLMError(f"{self.name} gave no answer to the sight check: {reply.end}")
            if parse_label(reply.text) != right:
                raise VLMError(
                    f"{self.name} did not tell black from white (wanted {right}, it wrote "
                    f"{' '.join(reply.text.split())[-80:]!r}): does it see images, two, in order?")


# ---- a batch of questions, side by side ----
# How to ask, how to read the answer, how the value is called in the log, and what it is for none.
Task = namedtuple("Task", "analyse answer parse value none")
PAIR = Task(ANALYSE, ANSWER, parse_label, "label", -2)
SCORE = Task(SCORE_ANALYSE, SCORE_ANSWER, parse_score, "score", None)
USELESS = ("no answer", "unreadable")  # kinds of record


def ask_one(ask, task, parts, goal, stages):
    """One question in one call or two -> what the log keeps of it."""
    began = time.monotonic()
    if stages == 1:
        replies = [ask([*parts, (task.analyse + task.answer).format(goal=goal)])]
    else:
        replies = [ask([*parts, task.analyse.format(goal=goal)])]
        if replies[0].end == "complete":
            notes = after_thinking(replies[0].text).strip()
            replies.append(ask([NOTES.format(goal=goal, notes=notes) + task.answer]))
    value, kind = None, "no answer"
    if replies[-1].end == "complete":
        value = task.parse(replies[-1].text)
        kind = "unreadable" if value is None else "unsure" if value == -1 else "label"
    return {"answers": [r.text for r in replies], "ends": [r.end for r in replies],
            task.value: task.none if value is None else value, "kind": kind,
            "tokens_in": sum(r.tokens_in for r in replies),
            "tokens_out": sum(r.tokens_out for r in replies),
            "cached": all(r.cached for r in replies),
            "seconds": round(time.monotonic() - began, 3)}


def in_threads(function, items, workers, stop):
    """Yield (item, function(item)) as they come. An exception in a thread is raised here, when the
    others, who begin nothing new, have come to an end too.
    """
    todo, done = list(reversed(items)), queue.SimpleQueue()

    def work():
        while todo and not stop.is_set():
            try:
                item = todo.pop()  # of a list, so one at a time
            except IndexError:  # another thread was faster
                return
            try:
                done.put((item, function(item), None))
            except BaseException as error:  # whatever it is, the caller must hear of it
                done.put((None, None, error))  # before those whom it stops
                stop.set()

    # Daemons: after Ctrl-C nobody has to wait for a server that takes two minutes.
    threads = [threading.Thread(target=work, daemon=True) for _ in items[:workers]]
    for thread in threads:
        thread.start()
    for _ in items:
        item, result, error = done.get()
        if error:
            for thread in threads:  # trap: the answers under way are paid for, and not yet kept
                thread.join()
            raise error
        yield item, result


def ask_batch(ask, task, questions, goal, stages, workers, log):
    """Ask side by side -> records, in order, and their count(). Each is logged when it is known,
    one at a time.

    questions: list of (dict of what the log should say of it, list of str and images to show); an
    empty list is a pair not worth asking.
    """
    if stages not in (1, 2) or not 1 <= workers <= MOST_WORKERS:
        raise ValueError("stages must be 1 or 2, and workers at least 1 and at most "
                         f"{MOST_WORKERS}, not {stages}, {workers}")
    records, stop = [None] * len(questions), threading.Event()
    vlm = getattr(ask, "__self__", None)
    vlm = vlm if isinstance(vlm, VLM) else None
    if vlm:
        vlm._silent_since = None  # of an earlier batch

    last = {}  # question -> the parts of its last call

    def work(i):
        def call(parts):
            last[i] = parts
            return vlm.answer(parts, stop=stop) if vlm else ask(parts)

        return ask_one(call, task, questions[i][1], goal, stages)

    def keep(i, record):
        records[i] = {**questions[i][0], "goal": goal, "stages": stages, **record}
        if log:
            log(records[i])

    unasked = {"answers": [], "ends": [], task.value: task.none, "tokens_in": 0, "tokens_out": 0,
               "cached": False, "seconds": 0.0}
    todo = [i for i, (_, parts) in enumerate(questions) if parts]
    for i in sorted(set(range(len(questions))) - set(todo)):
        keep(i, {**unasked, "kind": "identical"})
    # trap: with threads, "stop when the money is gone" depends on who finishes first. So the
    # limits of a VLM are looked at between blocks of questions, and none within: always the same.
    try:
        while todo and (room := vlm.room(stages) if vlm else len(todo)):
            for i, record in in_threads(work, todo[:room], workers, stop):
                keep(i, record)
            todo = todo[room:]
    finally:
        stop.set()  # after an error or Ctrl-C the threads begin nothing new
    for i in todo:
        keep(i, {**unasked, "kind": "limit"})
    try:
        return records, count(records)
    except VLMError:
        # trap: kept, the useless answers would end every run that goes on from here, likewise
        for i in last if vlm else ():
            if records[i]["kind"] in USELESS:
                vlm.forget(last[i])
        raise


def count(records):
    """Records -> dict of counts. VLMError if more than half of at least four came to nothing."""
    kinds = [record["kind"] for record in records]
    asked = [r for r in records if r["kind"] not in ("identical", "limit")]
    lost = [r for r in asked if r["kind"] in USELESS]
    if len(asked) >= 4 and 2 * len(lost) > len(asked):
        ends = [r["ends"][-1] if r["kind"] == "no answer" else "unreadable, such as "
                + repr(" ".join(r["answers"][-1].split())[-80:]) for r in lost]
        raise VLMError(f"{len(lost)} of {len(asked)} questions got no usable answer (mostly: "
                       f"{max(ends, key=ends.count)}); usable answers are kept: go on when the "
                       "server answers again, or with another --vlm-extra")
    names = ("unsure", "unreadable", "no_answer", "identical", "limit")
    return {"asked": len(asked), **{name: kinds.count(name.replace("_", " ")) for name in names},
            **{key: sum(r[key] for r in records) for key in ("cached", "tokens_in", "tokens_out")}}


def looks_identical(first, second):
    """(H, W, 3) uint8 twice -> bool. No channel of any pixel differs by 8 of 255 or more.

    Rendering noise is 1 or 2; an edge of contrast 100 that moved by a tenth of a pixel gives 10.
    """
    # trap: uint8 differences wrap round: 0 - 1 = 255.
    return bool(np.abs(first.astype(np.int16) - second).max() < 8)


def short_hash(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def check_images(**arrays):
    for name, images in arrays.items():
        if getattr(images, "ndim", 0) != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"{name} must be (N, H, W, 3) uint8, not {np.shape(images)} "
                             f"{getattr(images, 'dtype', type(images).__name__)}")


def label_pairs(ask, first, second, goal, stages=2, workers=8, log=None):
    """Labels for M pairs -> labels (M,) int8 in {0, 1, -1 unsure, -2 no label}, dict of counts.

    ask: VLM.ask (its limits then hold, in pair order) or any callable parts -> Reply.
    first, second: (M, H, W, 3) uint8.  log: called with one dict per pair as soon as its answer is
    known, one at a time (LabelLog.append is one).
    Raises VLMError when more than half of at least 4 pairs asked got no usable answer (the useless
    ones are then forgotten), and when the server answers nobody for as long as its deadline.
    """
    check_images(first=first, second=second)
    if first.shape != second.shape:
        raise ValueError(f"pictures of one size, please, not {first.shape} and {second.shape}")
    questions = [({"pair": i, "first": short_hash(one), "second": short_hash(two)},
                  [] if looks_identical(one, two) else ["Image 1:", one, "Image 2:", two])
                 for i, (one, two) in enumerate(zip(first, second))]
    records, counts = ask_batch(ask, PAIR, questions, goal, stages, workers, log)
    labels = np.array([record["label"] for record in records], dtype=np.int8)  # (M,)
    sides = {"label0": int((labels == 0).sum()), "label1": int((labels == 1).sum())}
    return labels, {**counts, **sides}


def score_images(ask, images, goal, stages=2, workers=8, log=None):
    """The paper's VLM Score baseline: images (N, H, W, 3) -> (N,) in [0, 1] or nan, counts."""
    check_images(images=images)
    questions = [({"image": i, "first": short_hash(image)}, ["Image:", image])
                 for i, image in enumerate(images)]
    records, counts = ask_batch(ask, SCORE, questions, goal, stages, workers, log)
    scores = np.array([record["score"] for record in records], dtype=np.float64)  # None -> nan
    return scores, {**counts, "scored": int(np.isfinite(scores).sum())}


def oracle_labels(score0, score1, rng, error_rate=0.0):
    """The paper's "GT Preference": (M,) scores twice -> (M,) int8 labels.

    -1: equal scores, or one that is not finite: it is neither more nor less than any other.
    """
    score0, score1 = np.asarray(score0, float), np.asarray(score1, float)
    labels = (score1 > score0).astype(np.int8)  # (M,)
    flip = rng.random(len(labels)) < error_rate  # drawn for ties too
    known = np.isfinite(score0) & np.isfinite(score1) & (score0 != score1)
    return np.where(known, labels ^ flip, -1).astype(np.int8)


class LabelLog:
    """labels.jsonl: one record a line, on disk when append() returns.

    keep: on resume, how many records to keep; what came after the checkpoint is asked again, from
    the cache. A last line torn by a crash is cut off, so the next one starts on its own line.
    """

    def __init__(self, path, keep=None):
        lines = []
        if os.path.exists(path):
            self.read(path)  # refuses what is not a label log before anything is cut
            lines = Path(path).read_bytes().split(b"\n")[:-1][:keep]
        self._file = open(path, "ab")
        self._file.truncate(sum(len(line) + 1 for line in lines))

    def append(self, record):
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


# ---- command line: label two files ----
# trap: Pillow knows more formats, and hands some of them to other programs.
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")


def as_seen(image):
    """PIL image of any mode -> RGB, turned upright, on white."""
    image = ImageOps.exif_transpose(image)  # trap: a phone stores its photos lying on their side
    if image.mode[0] in "IF":  # trap: convert() would clip these at 255
        values, white = np.asarray(image, np.float64), 1.0 if image.mode == "F" else 65535.0
        low, high = values.min(), values.max()  # nan, if any is
        # A scale of its own for each picture would make two of them incomparable, and 32 bits
        # that hold a byte ("I") are as likely a black picture as a bright one.
        if not (low >= 0 and high <= white) or (image.mode == "I" and high < 256):
            raise ValueError(f"numbers from {low:g} to {high:g}, and not 0 to {white:g}")
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path, most=4096):
    """File -> (H, W, 3) uint8, as a viewer shows it: upright, what is transparent on white.

    Of several pictures or pages, the first. 16 bits are scaled from 0..65535, floats from 0..1.
    VLMError if it is no picture, more than `most` pixels a side, or of numbers without a scale.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of odd EXIF data
            # trap: a few kilobytes of PNG can unpack to gigabytes; open() reads only the header.
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if max(height, width) <= most:
                    return np.array(as_seen(image))
    except Exception as error:  # a decoder fed with arbitrary bytes may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise VLMError(f"{path}: not a picture that can be used ({reason}); it may be "
                       f"{', '.join(FORMATS)}") from None
    raise VLMError(f"{path}: {width} x {height} pixels is too large (at most {most} a side)")


def main(arguments=None):
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
            server = subprocess.Popen([sys.executable, script, "--port", "0"], text=True,
                                      stdout=subprocess.PIPE)
            options.vlm_url = server.stdout.readline().rpartition(" ")[2].strip()
        vlm = VLM(options.vlm, url=options.vlm_url)
        label_pairs(vlm.ask, *images, options.goal, options.stages, log=records.append)
    except (VLMError, ValueError, KeyboardInterrupt) as error:
        print("vlm_query.py:", printable(error) or "stopped", file=sys.stderr)
        return 2
    finally:
        if server:
            server.terminate()
    record, = records
    for end, answer in zip(record["ends"], record["answers"]):
        print(printable(f"--- {options.vlm} ({end}) ---\n{answer}\n"))
    meaning = {0: f"{options.images[0]} is closer", 1: f"{options.images[1]} is closer",
               -1: "it cannot tell", -2: f"no label: {record['kind']}"}[record["label"]]
    print(printable(f"label {record['label']}: {meaning}; tokens: {vlm.tokens_in} in, "
                    f"{vlm.tokens_out} out"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
