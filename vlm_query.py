"""Ask a vision-language model (VLM) which of two images is closer to a goal, over plain HTTP.

STEP 3 of RL-VLM-F: call 1 shows both images and asks for words (ANALYSE), call 2 shows only those
words and asks for a label (DECIDE). One client speaks the formats of OpenAI (and all who copy it:
Ollama, vLLM, llama.cpp, LM Studio, SGLang), Gemini and Anthropic.

A label is 0 (first image closer), 1 (second), -1 (the VLM said it cannot tell) or -2 (no label).
Four things are no label, and counted apart: "unreadable" (the answer did not parse), "no answer"
(outage, refusal, cut off, empty), "identical" (never sent) and "limit" (calls or money used up).

Differs from the paper:
  1. Our own wording of the prompts; the official code has no licence.
  2. No temperature is sent: current models refuse it. The cache makes runs repeatable instead.
  3. A failed call is no "-1": it is asked again, then counted as "no answer", and half a batch of
     those stops the run. The official client trains on through an expired key.
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
import concurrent.futures
import email.utils
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from pathlib import Path
from urllib.parse import urlsplit

import imageio.v3 as iio
import numpy as np
import requests

# ---- STEP 3: ask the VLM which image is closer to the goal ----

ANALYSE = """Both images show the same scene at two different moments. The goal is {goal}.
1. Describe what matters for this goal in Image 1.
2. Describe what matters for this goal in Image 2.
3. How do the two images differ with respect to the goal, and which of them is nearer to it?"""

ANSWER = """Finish with one last line that holds a single number and nothing else:
0 if Image 1 is closer to the goal, 1 if Image 2 is closer to the goal,
-1 if it cannot be told or makes no difference."""

DECIDE = """Someone compared two images of the same scene. The goal was {goal}. The notes:
<notes>
{notes}
</notes>
Judge from these notes alone which image is closer to the goal.
""" + ANSWER

ONE_CALL = ANALYSE + "\n4. Decide which image is closer to the goal.\n" + ANSWER

SCORE_ANALYSE = """The goal is {goal}. Describe what matters for this goal in the image, and how
far the goal has been reached."""

SCORE_ANSWER = """Finish with one last line that holds a single number and nothing else: a decimal
number from 0 (as far from the goal as can be) to 1 (the goal is fully reached)."""

SCORE_DECIDE = """Someone described an image of a scene. The goal was {goal}. The notes:
<notes>
{notes}
</notes>
Judge from these notes alone how far the goal has been reached.
""" + SCORE_ANSWER

SIGHT_GOAL = "to make the picture as bright as possible"  # what check_sight() asks about

# `end` says how an answer ended: "complete", "cut off" (output cap, or still thinking), "refused"
# (by the model or a filter), "empty" (no words in it), or "unreachable: WHY" (retries used up).
Reply = namedtuple("Reply", "text end tokens_in tokens_out cached")


class VLMError(Exception):
    """Stop asking. One line: what happened, in the provider's words, and what to do."""


class LimitReached(VLMError):
    """max_calls or max_usd is used up."""


class _GaveUp(Exception):
    """One question stayed without an answer until its deadline."""


def after_thinking(text):
    """What stands after the last </think>; "" if the thinking never ended."""
    text = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in text else text


def _numbers(text, pattern):
    """The distinct numbers, as words of their own, in the last line that holds any word."""
    lines = [line for line in after_thinking(text).splitlines() if re.search(r"\w", line)]
    dashes = "[\u2010-\u2013\u2212\ufe63\uff0d]"  # models write a minus sign in many ways
    line = re.sub(dashes, "-", lines[-1] if lines else "")
    # trap: "Image 1 is better" names an image; taken as the label 1 it would mean Image 2.
    name = r"\W?[012]\b(?!\.\d)"
    line = re.sub(rf"(?i)\b(image|picture)s?\s*{name}(\s*(and|or|vs\.?|,|&)\s*{name})?", "", line)
    return set(re.findall(rf"(?<![\w.,/+-])(?<!-\s)({pattern})(?![\w%-]|[.,/]\d)", line))


def parse_label(text):
    """The last line of an answer -> 0, 1, -1, or None where it does not hold exactly one of them.

    "1" -> 1               "**0**" -> 0            "Answer: -1." -> -1    U+2212 and 1 -> -1
    "100% sure: 1" -> 1    "0.5" -> None           "0 or 1" -> None       "1/10" -> None
    "Image 1." -> None     "Image 1 wins: 0" -> 0  "- 1" -> None: a bullet, or a minus?
    "1", newline, "0" -> 0      "<think>1</think>0" -> 0      "<think>1" -> None      "" -> None
    """
    found = _numbers(text, "-1|0|1")
    return int(found.pop()) if len(found) == 1 else None


def parse_score(text):
    """The last line -> its one number in [0, 1], or None: "Score: 0.7" -> 0.7, "70" -> None."""
    found = _numbers(text, r"\d+(?:\.\d+)?")
    score = float(found.pop()) if len(found) == 1 else -1.0
    return score if 0 <= score <= 1 else None


# ---- the wire: what each provider wants to read and what it writes ----

def png_base64(image):
    """(H, W, 3) uint8 -> base64 of a PNG: lossless, and the same bytes for the same picture."""
    png = iio.imwrite("<bytes>", image, extension=".png", compress_level=1)
    return base64.b64encode(png).decode()


# trap: Anthropic compares the declared type with the bytes; a PNG called image/jpeg is a 400.
MEDIA = "image/png"


def _openai_body(model, parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else {
        "type": "image_url", "image_url": {"url": f"data:{MEDIA};base64,{png_base64(part)}"}}
        for part in parts]
    # No output cap: left out, it is the model's own, and thinking counts against it.
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def _openai_read(data):
    choice, usage = data["choices"][0], data.get("usage") or {}
    end = {"stop": "complete", "content_filter": "refused"}.get(choice["finish_reason"], "cut off")
    if choice["message"].get("refusal"):
        end = "refused"
    text = choice["message"].get("content") or choice["message"].get("refusal")
    return text, end, usage.get("prompt_tokens"), usage.get("completion_tokens")


def _gemini_body(model, parts):
    # trap: some gateways drop camelCase "inlineData" silently and answer from the text alone.
    return {"contents": [{"role": "user", "parts": [
        {"text": part} if isinstance(part, str) else
        {"inline_data": {"mime_type": MEDIA, "data": png_base64(part)}} for part in parts]}]}


def _gemini_read(data):
    usage = data.get("usageMetadata") or {}
    tokens_in = usage.get("promptTokenCount")
    # trap: thinking is billed as output but counted apart.
    tokens_out = (usage.get("candidatesTokenCount") or 0) + (usage.get("thoughtsTokenCount") or 0)
    blocked = (data.get("promptFeedback") or {}).get("blockReason")
    if blocked:  # then there are no candidates at all
        return f"(blocked: {blocked})", "refused", tokens_in, tokens_out
    answer = data["candidates"][0]
    end = {"STOP": "complete", "MAX_TOKENS": "cut off", "MALFORMED_RESPONSE": "cut off",
           "CONTINUATION": "cut off", "LANGUAGE": "cut off"}.get(answer["finishReason"], "refused")
    parts = (answer.get("content") or {}).get("parts") or []  # may be missing when cut off
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    return text, end, tokens_in, tokens_out


def _anthropic_body(model, parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else
               {"type": "image", "source": {"type": "base64", "media_type": MEDIA,
                                            "data": png_base64(part)}} for part in parts]
    # trap: max_tokens must be given, and thinking counts against it: a small one gives no answer.
    return {"model": model, "max_tokens": 8192, "messages": [{"role": "user", "content": content}]}


def _anthropic_read(data):
    end = {"end_turn": "complete", "refusal": "refused"}.get(data["stop_reason"], "cut off")
    text = "".join(block["text"] for block in data["content"] if block["type"] == "text")
    usage = data.get("usage") or {}
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return text, end, sum(usage.get(kind) or 0 for kind in kinds), usage.get("output_tokens")


# headers(key) -> dict; body(model, parts) -> dict; read(dict) -> (text, end, tokens in and out)
Wire = namedtuple("Wire", "path headers body read")
OPENAI = Wire("/chat/completions", lambda key: {"Authorization": f"Bearer {key}"} if key else {},
              _openai_body, _openai_read)
# trap: Gemini also takes ?key=..., which ends up in logs and error messages; a header does not.
GEMINI = Wire("/models/{model}:generateContent", lambda key: {"x-goog-api-key": key},
              _gemini_body, _gemini_read)
ANTHROPIC = Wire("/messages", lambda key: {"x-api-key": key, "anthropic-version": "2023-06-01"},
                 _anthropic_body, _anthropic_read)

# provider: (wire, base URL, variable with the key, is a key needed)
PROVIDERS = {
    "openai": (OPENAI, "https://api.openai.com/v1", "OPENAI_API_KEY", True),
    "gemini": (GEMINI, "https://generativelanguage.googleapis.com/v1beta", "GEMINI_API_KEY", True),
    "anthropic": (ANTHROPIC, "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", True),
    "local": (OPENAI, None, "LOCAL_API_KEY", False),
    "offline": (OPENAI, None, "LOCAL_API_KEY", False),
}

RETRY = {408, 409, 425, 429}  # and every 5xx
QUOTA_GONE = ("insufficient_quota", "billing_hard_limit_reached", "enforced_spend_limit_reached")
# What an error body under HTTP 200 would have said as a status; any other is treated like a 500.
ERROR_STATUS = {"authentication_error": 401, "permission_error": 403, "not_found_error": 404,
                "invalid_request_error": 400, "billing_error": 402, "rate_limit_error": 429}
FILTERED = ("content_filter", "content_policy_violation")  # a refusal that comes as a 400
CURE = {401: "check the key", 403: "check the key and what it may use",
        402: "check the plan and the spend limit", 404: "check the model's name and the URL",
        429: "the quota is used up, waiting does not help: check the plan, then resume"}


def wait_wished(headers, error):
    """Seconds the server asked to wait, or None. Headers, or Gemini's retryDelay: "34s"."""
    wish, scale = headers.get("retry-after-ms"), 1e-3
    if wish is None:
        wish, scale = headers.get("retry-after"), 1.0
    if wish is None and isinstance(error.get("details"), list):
        delays = [d.get("retryDelay") for d in error["details"] if isinstance(d, dict)]
        wish = next((d.rstrip("s") for d in delays if isinstance(d, str)), None)
    if wish is None:
        return None
    try:
        # trap: floats are in use, and urllib3's own Retry raises on them.
        seconds = float(wish) * scale
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(wish).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if np.isfinite(seconds) else None


def _error_in(raw):
    """Body text -> the error it holds as a dict {message, code, ...}, {} if it holds none."""
    try:
        data = json.loads(raw)
    except ValueError:
        page = re.search(r"(?is)<title>(.*?)</title>", raw)
        return {"message": page.group(1) if page else raw or "(nothing)"}
    data = data[0] if isinstance(data, list) and data else data  # Gemini: sometimes in a list
    if not isinstance(data, dict):
        return {"message": raw}
    error = data.get("error") or data.get("detail")
    if not error and data.get("type") == "error":
        error = data
    return error if isinstance(error, dict) else {"message": str(error)} if error else {}


class VLM:
    """One model behind one URL. Safe to call from several threads.

    name: "openai/MODEL", "gemini/MODEL", "anthropic/MODEL", "local/MODEL" or "offline".
    url: base of the server; needed for local and offline, elsewhere instead of the official one.
    key: by default from the environment.  cache: a folder.  workers: connections kept open.
    timeout: seconds (to connect, for one try as a whole).  deadline: seconds after which no
    further try of a question begins.  extra: merged into every body: {"reasoning_effort": "low"}.
    usd_per_mtok: dollars per million tokens (in, out), for usd and max_usd.

    calls, tokens_in, tokens_out and usd count every answer used, also those from the cache, so
    that a repeated or resumed run meets its limits at the same pair; cached_calls were free.
    """

    backoff = 1.0  # seconds; full jitter: wait random() * min(60, 2**try) * backoff

    def __init__(self, name, url=None, key=None, cache=None, workers=8, max_calls=None,
                 timeout=(10, 120), extra=None, max_usd=None, usd_per_mtok=None, deadline=300):
        provider, _, self.model = name.partition("/")
        if provider not in PROVIDERS:
            raise VLMError(f"unknown VLM {name!r}: use one of {', '.join(PROVIDERS)}, then /MODEL")
        self.wire, base, variable, needs_key = PROVIDERS[provider]
        if provider == "offline":
            self.model = self.model or "offline-stand-in"
        base = (url or base or "").rstrip("/")
        parts = urlsplit(base)
        if not base:
            raise VLMError(f"{name} needs its server's URL, such as http://localhost:11434/v1")
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search("[@?]", base):
            raise VLMError("the VLM's URL must look like http://host:port/v1, no user, no query")
        if not self.model:
            raise VLMError(f"name the model too: {name}/MODEL")
        if max_usd is not None and usd_per_mtok is None:
            raise VLMError("max_usd needs usd_per_mtok: dollars per million tokens (in, out)")
        self._key = (key or os.environ.get(variable) or "").strip()
        if needs_key and not self._key:
            raise VLMError(f"{name} needs a key: set {variable} in the environment")
        # trap: requests quotes a header it cannot send, key included, in its own error message.
        if not re.fullmatch(r"[!-~]*", self._key):
            raise VLMError(f"{variable} holds a space or a character that no key has")
        self.name, self.url = name, base + self.wire.path.format(model=self.model)
        self.extra, self.timeout, self.deadline = extra or {}, timeout, deadline
        self.max_calls, self.max_usd, self.usd_per_mtok = max_calls, max_usd, usd_per_mtok
        self.calls = self.cached_calls = self.tokens_in = self.tokens_out = 0
        self.cache = Path(cache) if cache else None
        if self.cache:
            self.cache.mkdir(parents=True, exist_ok=True)
        self._lock, self._not_before, self._halt = threading.Lock(), 0.0, threading.Event()
        self._session = requests.Session()
        self._session.headers.update(self.wire.headers(self._key))
        self._session.headers["Content-Type"] = "application/json"
        # trap: a ~/.netrc entry for the host would replace our Authorization header.
        self._session.auth = lambda request: request
        # trap: a proxy named in the environment would be asked for localhost as well.
        self._session.trust_env = parts.hostname not in ("localhost", "127.0.0.1", "::1")
        for scheme in ("http://", "https://"):  # the default pool keeps 10 connections
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=workers))

    @property
    def usd(self):
        """What the answers used so far cost, or None without a price."""
        return self._price(self.tokens_in, self.tokens_out)

    def _price(self, tokens_in, tokens_out):
        if self.usd_per_mtok is None:
            return None
        return (tokens_in * self.usd_per_mtok[0] + tokens_out * self.usd_per_mtok[1]) / 1e6

    def limit(self, calls, tokens_in, tokens_out):
        """"" while that many calls and tokens are within the limits, else the limit they break."""
        if self.max_calls is not None and calls > self.max_calls:
            return f"the limit of {self.max_calls} calls is reached"
        if self.max_usd is not None and self._price(tokens_in, tokens_out) >= self.max_usd:
            return f"the limit of ${self.max_usd} is reached"
        return ""

    def state_dict(self):
        """Running totals, for a checkpoint."""
        return {k: getattr(self, k) for k in ("calls", "cached_calls", "tokens_in", "tokens_out")}

    def load_state_dict(self, totals):
        for name, value in totals.items():
            setattr(self, name, value)

    def ask(self, parts):
        """parts: list of str | (H, W, 3) uint8 -> Reply. Raises LimitReached, VLMError."""
        why = self.limit(self.calls + 1, self.tokens_in, self.tokens_out)
        if why:
            raise LimitReached(why)
        return self.answer(parts)

    def answer(self, parts, deadline=None):
        """ask() without its limits, for batches that checked them before (label_pairs)."""
        body = json.dumps(_merged(self.wire.body(self.model, parts), self.extra)).encode()
        # trap: the stand-in gets another port at each start; its model name says all that matters.
        where = "offline" if self.name.startswith("offline") else f"{self.name}\n{self.url}"
        key = hashlib.sha256(where.encode() + b"\n" + body).hexdigest()
        raw = self._cached(key)
        cached = raw is not None
        if not cached:
            try:
                raw = self._send(body, deadline or self.deadline)
            except _GaveUp as error:
                return Reply("", f"unreachable: {error}", 0, 0, False)
        text, end, tokens_in, tokens_out = self._read(raw)
        # Refused and cut-off answers were paid for, so they are kept too; errors never get here.
        if not cached and end != "empty":
            self._store(key, raw)
        with self._lock:
            self.calls += 1
            self.cached_calls += cached
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
        return Reply(text, end, tokens_in, tokens_out, cached)

    def _read(self, raw):
        """Body of an answer -> (text, end, tokens in, tokens out)."""
        data = json.loads(raw)
        if "error" in data and data["error"]:
            return "(filtered)", "refused", 0, 0  # _judge let no other error through
        try:
            text, end, tokens_in, tokens_out = self.wire.read(data)
        except (KeyError, IndexError, TypeError, AttributeError):
            text, end, tokens_in, tokens_out = "", "empty", 0, 0  # such as "choices": []
        text = text if isinstance(text, str) else ""
        if end == "complete" and text and not after_thinking(text).strip():
            end = "cut off"  # all of it was thinking
        elif end == "complete" and not text.strip():
            end = "empty"
        return text, end, int(tokens_in or 0), int(tokens_out or 0)

    def _cached(self, key):
        """The stored body, or None; a torn or altered file counts as none and is asked again."""
        if self.cache is None:
            return None
        try:
            entry = json.loads((self.cache / f"{key}.json").read_bytes())
            whole = entry["sha256"] == hashlib.sha256(entry["response"].encode()).hexdigest()
            return entry["response"] if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _store(self, key, raw):
        if self.cache is None:
            return
        entry = {"sha256": hashlib.sha256(raw.encode()).hexdigest(), "response": raw}
        new = self.cache / f"{key}.{threading.get_ident()}.tmp"
        with open(new, "w") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())  # on disk before anything is learned from it
        os.replace(new, self.cache / f"{key}.json")

    def _send(self, body, deadline):
        """POST until there is an answer -> its body. Raises _GaveUp; VLMError if hopeless."""
        stop_at = time.monotonic() + deadline
        for tries in range(1, 10_000):
            self._sleep_until(self._not_before, stop_at, "told to wait")
            status, wish = None, None
            try:
                status, headers, raw = self._post(body)
            # trap: while the body is read, errors of urllib3 come through, not those of requests.
            except (requests.RequestException, requests.exceptions.BaseHTTPError) as error:
                why = f"{type(error).__name__} at {self.url}"
            else:
                why, wish = self._judge(status, headers, raw)
                if not why:
                    return raw
            # Full jitter spreads the threads; a fixed wait would send them all at once again.
            wait = random.random() * min(60, 2 ** min(tries - 1, 6)) * self.backoff
            until = time.monotonic() + (wait if wish is None else wish)
            if status == 429 or wish is not None:  # one was told to slow down: all slow down
                with self._lock:
                    self._not_before = max(self._not_before, until)
            self._sleep_until(until, stop_at, f"{why}, {tries} tries")

    def _sleep_until(self, moment, stop_at, why):
        if moment > stop_at:
            more = max(0, moment - time.monotonic())
            raise _GaveUp(f"{why}; {more:.0f} s more is past the deadline")
        if self._halt.wait(max(0.0, moment - time.monotonic())):
            raise _GaveUp("stopped")

    def _post(self, body):
        """-> (status, headers, body text)"""
        limit = time.monotonic() + self.timeout[1]
        # trap: following a redirect would turn the POST into a GET and hand the key to a stranger.
        with self._session.post(self.url, data=body, timeout=self.timeout, stream=True,
                                allow_redirects=False) as response:
            pieces = []
            # trap: the timeout of requests is for one read of the socket: a server that drips a
            # byte a second never meets it. So the body is read piece by piece, against the clock.
            while piece := response.raw.read1(65536, decode_content=True):
                pieces.append(piece)
                if time.monotonic() > limit:
                    raise requests.Timeout("the answer drips")
            raw = b"".join(pieces).decode("utf-8", "replace")
            return response.status_code, response.headers, raw

    def _judge(self, status, headers, raw):
        """-> ("", None): an answer; (why, seconds wished or None): ask again; else VLMError."""
        error = _error_in(raw)
        code = str(error.get("code") or error.get("type") or "")
        if status == 400 and code in FILTERED:
            return "", None
        if status == 200 and not error:
            return "", None
        said = " ".join(str(error.get("message", "")).split())[:300]
        if self._key:  # some providers quote the key they did not like
            said = said.replace(self._key, "[key]")
        if status == 200 and raw.lstrip()[:1] == "<":
            raise VLMError(f"{self.url} answered with a web page ({said}): check the URL")
        if status == 200 and code.isdigit():
            status = int(code)
        elif status == 200:
            status = ERROR_STATUS.get(str(error.get("type")), 500)
        why = f"HTTP {status} from {self.url}: {said}"
        quota = json.dumps(error)
        gone = status == 429 and (any(word in quota for word in QUOTA_GONE)
                                  or re.search(r'"quotaId": "\w*PerDay', quota))
        if gone or not (status in RETRY or status >= 500):
            cure = CURE.get(status, "check the URL" if status < 400 else "change what it refuses")
            raise VLMError(f"{why} - {cure}")
        return why, wait_wished(headers, error)

    def check_sight(self):
        """Black against white, in both orders: did both pictures arrive, in that order?

        A server that drops pictures, a text-only model, a truncated context: all answer something.
        Two calls. On resume, call it before load_state_dict(): the totals loaded include it.
        """
        black, white = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), 255, np.uint8)
        for first, second, right in ((black, white, 1), (white, black, 0)):
            parts = ["Image 1:", first, "Image 2:", second, ONE_CALL.format(goal=SIGHT_GOAL)]
            reply = self.answer(parts, deadline=min(30, self.deadline))
            if reply.end != "complete":
                raise VLMError(f"{self.name} gave no answer to the sight check: {reply.end}")
            if parse_label(reply.text) != right:
                raise VLMError(
                    f"{self.name} did not tell black from white (wanted {right}, it wrote "
                    f"{' '.join(reply.text.split())[-80:]!r}): does it see images, two, in order?")


def _merged(body, extra):
    """extra laid over body, dict by dict, so that a setting leaves its neighbours alone."""
    both = {k: _merged(body[k], v) if isinstance(v, dict) and isinstance(body.get(k), dict) else v
            for k, v in extra.items()}
    return {**body, **both}


# ---- a batch of questions, in threads ----

def _ask_all(ask, jobs, calls_each, workers):
    """Run jobs (each: ask -> record with tokens_in, tokens_out) side by side -> list of records.

    None stands for a job that the limits of a VLM's ask did not allow.
    """
    # trap: with threads, "stop when the money is gone" depends on who finishes first. So limits
    # are decided here, in order, from the jobs 4 * workers or more places back: always the same.
    vlm = getattr(ask, "__self__", None)
    vlm = vlm if isinstance(vlm, VLM) else None
    used = (vlm.calls, vlm.tokens_in, vlm.tokens_out) if vlm else (0, 0, 0)
    stop, futures = threading.Event(), []
    halt = vlm._halt if vlm else threading.Event()

    def run(job):
        if stop.is_set():
            return None
        try:
            return job(vlm.answer if vlm else ask)
        except BaseException:
            stop.set()
            halt.set()  # wakes the threads that wait for their next try
            raise

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for place, job in enumerate(jobs):
            if place >= 4 * workers and (done := futures[place - 4 * workers].result()):
                used = used[0], used[1] + done["tokens_in"], used[2] + done["tokens_out"]
            used = used[0] + calls_each, *used[1:]
            if stop.is_set() or (vlm and vlm.limit(*used)):
                break
            futures.append(pool.submit(run, job))
        for future in concurrent.futures.wait(futures, return_when="FIRST_EXCEPTION").done:
            future.result()  # raises what a job raised
        return [future.result() for future in futures] + [None] * (len(jobs) - len(futures))
    except BaseException:  # Ctrl-C too: begin nothing new
        stop.set()
        halt.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # what is under way was paid for: keep it
        halt.clear()


def _two_stage(ask, images, analyse, decide, one_call, goal, stages):
    """-> list of Replies; the last one holds the verdict, or is the one that failed."""
    replies = [ask(images + [(analyse if stages == 2 else one_call).format(goal=goal)])]
    if stages == 2 and replies[0].end == "complete":
        notes = after_thinking(replies[0].text).strip()
        replies.append(ask([decide.format(goal=goal, notes=notes)]))
    return replies


def _record(replies, value, began):
    """What the log keeps of one question. value: what was parsed, None if unreadable."""
    failed = replies[-1].end != "complete"
    return {"answers": [r.text for r in replies], "ends": [r.end for r in replies],
            "kind": "no answer" if failed else "unreadable" if value is None else "label",
            "tokens_in": sum(r.tokens_in for r in replies),
            "tokens_out": sum(r.tokens_out for r in replies),
            "cached": all(r.cached for r in replies),
            "seconds": round(time.monotonic() - began, 3)}


def _sums(records):
    return {name: sum(r[name] for r in records) for name in ("cached", "tokens_in", "tokens_out")}


def _half_or_more(records):
    """Stop when more than half of at least four questions brought nothing to train on."""
    lost = [r for r in records if r["kind"] in ("no answer", "unreadable")]
    if len(records) >= 4 and 2 * len(lost) > len(records):
        ends = [r["ends"][-1] if r["kind"] == "no answer" else "unreadable, such as "
                + repr(" ".join(r["answers"][-1].split())[-80:]) for r in lost]
        raise VLMError(f"{len(lost)} of {len(records)} questions got no usable answer (mostly: "
                       f"{max(ends, key=ends.count)}); answers are kept: resume when cured")


def looks_identical(first, second):
    """(H, W, 3) uint8 twice -> bool. No channel of any pixel differs by 8 of 255 or more.

    Rendering noise is 1 or 2; an edge of contrast 100 that moved by a tenth of a pixel gives 10.
    """
    # trap: uint8 differences wrap round: 0 - 1 = 255.
    return first.shape == second.shape and bool(np.abs(first.astype(np.int16) - second).max() < 8)


def label_pairs(ask, first, second, goal, stages=2, workers=8, log=None, progress=None):
    """Labels for M pairs -> labels (M,) int8 in {0, 1, -1 unsure, -2 no label}, dict of counts.

    ask: VLM.ask (its limits then hold, in pair order) or any callable parts -> Reply.
    first, second: (M, H, W, 3) uint8.  log: called with one dict per pair as soon as its answer is
    known, one at a time (LabelLog.append is one).  progress: called with the number of pairs done.
    Raises VLMError when more than half of at least 4 pairs asked got no usable answer.
    """
    _check_images(first, "first")
    _check_images(second, "second")
    if len(first) != len(second) or stages not in (1, 2):
        raise ValueError("first and second must be equally many; stages must be 1 or 2")
    lock, done = threading.Lock(), [0]

    def finish(record):
        with lock:
            if log:
                log(record)
            done[0] += 1
            if progress:
                progress(done[0])
        return record

    def head(i):
        return {"pair": i, "first": _short_hash(first[i]), "second": _short_hash(second[i]),
                "goal": goal, "stages": stages}

    def unasked(i, kind):
        return finish({**head(i), "answers": [], "ends": [], "label": -2, "kind": kind,
                       "tokens_in": 0, "tokens_out": 0, "cached": False, "seconds": 0.0})

    def job(i):
        def run(ask):
            began = time.monotonic()
            images = ["Image 1:", first[i], "Image 2:", second[i]]
            try:
                replies = _two_stage(ask, images, ANALYSE, DECIDE, ONE_CALL, goal, stages)
            except LimitReached:  # only an ask that is no VLM's own raises it here
                return unasked(i, "limit")
            label = parse_label(replies[-1].text)
            record = {**head(i), "label": label, **_record(replies, label, began)}
            if record["kind"] != "label":
                record["label"] = -2
            elif label == -1:
                record["kind"] = "unsure"
            return finish(record)
        return run

    same = [i for i in range(len(first)) if looks_identical(first[i], second[i])]
    records = {i: unasked(i, "identical") for i in same}
    ask_these = [i for i in range(len(first)) if i not in records]
    for i, record in zip(ask_these, _ask_all(ask, [job(i) for i in ask_these], stages, workers)):
        records[i] = record or unasked(i, "limit")
    records = [records[i] for i in range(len(first))]
    asked = [r for r in records if r["kind"] not in ("identical", "limit")]
    _half_or_more(asked)
    kinds = {name: sum(r["kind"] == name.replace("_", " ") for r in records)
             for name in ("unsure", "unreadable", "no_answer", "identical", "limit")}
    counts = {"asked": len(asked), "label0": sum(r["label"] == 0 for r in records),
              "label1": sum(r["label"] == 1 for r in records), **kinds, **_sums(records)}
    return np.array([r["label"] for r in records], dtype=np.int8), counts


def score_images(ask, images, goal, stages=2, workers=8, log=None):
    """The paper's VLM Score baseline: images (N, H, W, 3) -> (N,) in [0, 1] or nan, counts."""
    _check_images(images, "images")
    lock = threading.Lock()

    def job(i):
        def run(ask):
            began = time.monotonic()
            replies = _two_stage(ask, ["Image:", images[i]], SCORE_ANALYSE, SCORE_DECIDE,
                                 SCORE_ANALYSE + "\n" + SCORE_ANSWER, goal, stages)
            score = parse_score(replies[-1].text)
            record = {"image": i, "first": _short_hash(images[i]), "goal": goal, "stages": stages,
                      "score": score, **_record(replies, score, began)}
            with lock:
                if log:
                    log(record)
            return record
        return run

    records = _ask_all(ask, [job(i) for i in range(len(images))], stages, workers)
    asked = [r for r in records if r]
    _half_or_more(asked)
    scores = [r["score"] if r and r["kind"] == "label" else np.nan for r in records]
    counts = {"asked": len(asked), "scored": int(np.isfinite(np.array(scores, float)).sum()),
              "limit": len(records) - len(asked), **_sums(asked)}
    return np.array(scores, dtype=np.float64), counts


def _check_images(images, name):
    if getattr(images, "ndim", 0) != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        shape, dtype = getattr(images, "shape", type(images)), getattr(images, "dtype", "")
        raise ValueError(f"{name} must be (N, H, W, 3) uint8, not {shape} {dtype}")


def _short_hash(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def oracle_labels(score0, score1, rng, error_rate=0.0):
    """The paper's "GT Preference": (M,) scores twice -> (M,) int8 labels; equal scores -> -1."""
    score0, score1 = np.asarray(score0, float), np.asarray(score1, float)
    labels = (score1 > score0).astype(np.int8)  # (M,)
    flip = rng.random(len(labels)) < error_rate  # drawn for ties too
    return np.where(score0 == score1, -1, labels ^ flip).astype(np.int8)


class LabelLog:
    """labels.jsonl: one record a line, on disk when append() returns.

    keep: on resume, how many records to keep; what came after the checkpoint is asked again, from
    the cache. A last line torn by a crash is cut off, so the next one starts on its own line.
    """

    def __init__(self, path, keep=None):
        self.path, lines = Path(path), []
        if self.path.exists():
            self.read(self.path)  # refuses what is not a label log before anything is cut
            lines = self.path.read_bytes().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith(b"\n")][:keep]
        self._file = open(self.path, "ab")
        self._file.truncate(sum(map(len, lines)))
        self._lock = threading.Lock()

    def append(self, record):
        with self._lock:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self):
        self._file.close()

    @staticmethod
    def read(path):
        """-> list of dicts, without a torn last line. VLMError for a line that is no record."""
        records = []
        *lines, _torn = Path(path).read_bytes().split(b"\n")  # _torn is b"" after a clean end
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise VLMError(f"{path}: line {number} is not a label record") from None
            records.append(record)
        return records


# ---- command line: label two files ----

def load_image(path, most=4096):
    """File -> (H, W, 3) uint8. VLMError if it is no picture, or more than `most` pixels a side."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of some oversized pictures
            # trap: a few kilobytes of PNG can unpack to gigabytes; the header tells before.
            height, width = iio.improps(path).shape[:2]
            if max(height, width) <= most:
                return np.ascontiguousarray(iio.imread(path, mode="RGB"))
    except Exception as error:  # a decoder fed with arbitrary bytes may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise VLMError(f"{path}: not a picture that can be used ({reason})") from None
    raise VLMError(f"{path}: {width} x {height} pixels is too large (at most {most} a side)")


def start_stand_in():
    """Run offline_vlm.py, if it lies beside this file -> (process, url)."""
    script = Path(__file__).with_name("offline_vlm.py")
    if not script.exists():
        raise VLMError("--vlm offline needs --vlm-url: start offline_vlm.py --port 8080 yourself")
    process = subprocess.Popen([sys.executable, str(script), "--port", "0"], text=True,
                               stdout=subprocess.PIPE)
    url = re.search(r"http://\S+", process.stdout.readline())
    if not url:
        raise VLMError("offline_vlm.py did not start: run it yourself and see what it says")
    return process, url.group()


def demo():
    """Three pairs of grey pictures, judged by a toy that sees nothing but brightness."""
    def ask(parts):
        levels = [part.mean() for part in parts if not isinstance(part, str)]
        if levels:  # stage 1: it sees the pictures and says what it sees
            text = "Image 1 has brightness {:.0f}, Image 2 has brightness {:.0f}.".format(*levels)
        else:  # stage 2: it decides from the words
            one, two = map(int, re.findall(r"brightness (\d+)", parts[0]))
            text = f"Image {1 if one > two else 2} is brighter.\n{int(two > one)}"
        return Reply(text, "complete", 0, 0, False)

    first, second = (np.stack([np.full((64, 64, 3), v, np.uint8) for v in levels])
                     for levels in ((20, 200, 90), (160, 40, 91)))
    labels, counts = label_pairs(ask, first, second, "to light the room", log=lambda record: print(
        f"pair {record['pair']}: {record['kind']} {record['label']}  {record['answers']}"))
    print(f"labels {labels.tolist()}; expected [1, 0, -2]: the third pair looks identical")
    print("With files: python vlm_query.py a.png b.png --goal ... --vlm gemini/MODEL")
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Which of two images is closer to a goal?")
    parser.add_argument("images", nargs="*", metavar="image", help="two files; none for a demo")
    parser.add_argument("--goal", help='such as "to open the drawer"')
    parser.add_argument("--vlm", default="offline", help=f"{', '.join(PROVIDERS)}, then /MODEL")
    parser.add_argument("--vlm-url", help="its base URL, such as http://localhost:11434/v1")
    parser.add_argument("--stages", type=int, choices=(1, 2), default=2)
    options = parser.parse_args(arguments)
    if not options.images:
        return demo()
    if len(options.images) != 2 or not options.goal:
        parser.error("give two images and --goal")
    process = None
    try:
        first, second = [load_image(path) for path in options.images]
        url = options.vlm_url
        if options.vlm == "offline" and not url:
            process, url = start_stand_in()
        vlm, records = VLM(options.vlm, url=url), []
        labels, counts = label_pairs(vlm.ask, first[None], second[None], options.goal,
                                     options.stages, log=records.append)
    except VLMError as error:
        print(f"vlm_query.py: {error}", file=sys.stderr)
        return 2
    finally:
        if process:
            process.terminate()
    for number, answer in enumerate(records[0]["answers"], start=1):
        print(f"--- answer {number} of {vlm.name}: {records[0]['ends'][number - 1]} ---")
        print(answer, end="\n\n")
    meaning = {0: f"{options.images[0]} is closer", 1: f"{options.images[1]} is closer",
               -1: "it cannot tell", -2: f"no label: {records[0]['kind']}"}[int(labels[0])]
    tokens = f"{counts['tokens_in']} tokens in, {counts['tokens_out']} out"
    print(f"label {labels[0]}: {meaning} ({tokens})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
