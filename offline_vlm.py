"""A stand-in for a vision-language model (VLM): a real HTTP server, but no VLM.

It lets everything run without a key, a network or a GPU.  It speaks the wire formats of OpenAI (chat
completions and responses), Gemini (generateContent) and Anthropic (messages) on loopback, decodes
the pictures it was sent, measures them with a few lines of numpy per goal (READERS), says in words
what it measured, and decides from the words, as a VLM does in the two stages of STEP 3.  It never
sees the simulator.  It knows the goals of the built-in tasks only; any other is an HTTP 400 that
names them.  Its answers and its model name say that it is no VLM.

What it does with a question, by what is in it:
  two images                 describe both; decide as well if the text asks for 0, 1 or -1
  its description, no image  decide from the numbers in the words
  one image                  describe it; give a score as well if the text asks for one
  notes on one image         a score from the words
Where the images differ by less than the reader's margin it answers -1.

Mistakes, unsure answers: drawn from a hash of (seed, goal, images), so they depend on neither order
nor threads.  A mistaken description has its two images exchanged, so both stages tell the same lie.
Faults: see FAULTS; drawn from a hash of (seed, request, how often it was seen), so retries succeed.

Shapes: a reader maps (H, W, 3) uint8 to a float in the unit of its sentence, nan if it sees nothing.

To use it elsewhere (any HTTP client will do; the openai package takes base_url=url):
    with OfflineVLM(mistakes=0.1) as url:
        goal = "Hello! The goal is " + SIGHT  # or content parts with images, as OpenAI has them
        body = json.dumps({"model": "any", "messages": [{"role": "user", "content": goal}]}).encode()
        reply = json.load(urllib.request.urlopen(url + "/chat/completions", body))
        print(reply["choices"][0]["message"]["content"])
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
import urllib.request
from collections import Counter, namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio.v3 as iio
import numpy as np

NAME = "offline-stand-in-not-a-VLM"
SAYS = "(offline stand-in, not a VLM)"
SIGHT = "to make the picture as bright as possible"  # what a client's sight check asks about


# ---- what it can see: one reader per goal, each a self-contained function on numpy arrays ----

def read_brightness(image):
    """(H, W, 3) uint8 -> mean brightness, 0 to 255."""
    return float(image.mean())


def read_pole(image):
    """(H, W, 3) uint8 -> angle of the brown pole in degrees, 0 upright, positive leans right."""
    pixels = image.astype(np.float64)
    # Brown has more red than blue; the share of brown in a pixel is its weight.
    brown = np.clip((pixels[..., 0] - pixels[..., 2]) / 110.0, 0.0, 1.0)  # (H, W)
    brown[brown < 0.08] = 0.0  # the noise of a JPEG
    amount = brown.sum(axis=1)  # (H,) how wide the pole is in each row
    if (amount > 0.5).sum() < 5:
        return float("nan")
    rows = np.flatnonzero(amount > 0.6 * np.median(amount[amount > 0.5]))
    if len(rows) < 6:
        return float("nan")
    cut = max(1, len(rows) // 8)  # at the slanted tip, and where the cart cuts it, the middle is off
    rows = rows[cut:-cut]
    middle = (brown[rows] * np.arange(brown.shape[1])).sum(axis=1) / amount[rows]  # (rows,) columns
    slope = np.polyfit(rows, middle, 1)[0]  # columns per row, rows counted downwards
    return float(-np.degrees(np.arctan(slope)))


# read: the function; says: the sentence; merit(value): larger is closer to the goal; worst, best:
# merits that a score of 0 and 1 stand for; margin: merits closer than this cannot be told apart.
Reader = namedtuple("Reader", "read says merit worst best margin")

READERS = {
    SIGHT: Reader(read_brightness, "the picture has a mean brightness of {value:.0f} of 255",
                  lambda value: value, 0, 255, 8),
    "to balance the brown pole on the black cart to be upright": Reader(
        read_pole, "the brown pole leans {value:+.1f} degrees from upright",
        lambda degrees: -abs(degrees), -30, 0, 0.5),
}


def find_value(reader, text, number):
    """The value that a description gives for "Image NUMBER", or nan."""
    before, after = re.split(r"\{value.*?\}", reader.says)
    found = re.search(rf"Image {number}: {re.escape(before)}([-+]?[\d.]+){re.escape(after)}", text)
    return float(found.group(1)) if found else float("nan")


def describe(reader, images, lie, doubt):
    """Two images or one -> sentences. A lie exchanges the two images."""
    values = [reader.read(image) for image in images]
    values = values[::-1] if lie else values
    lines = []
    for number, value in enumerate(values, start=1):
        if doubt or not np.isfinite(value):
            lines.append(f"Image {number}: what matters for the goal cannot be made out.")
        else:
            lines.append(f"Image {number}: {reader.says.format(value=value)}.")
    return "\n".join(lines)


def decide(reader, text):
    """Words -> "0", "1" or "-1"."""
    merits = [reader.merit(find_value(reader, text, number)) for number in (1, 2)]
    if not np.isfinite(merits).all() or abs(merits[0] - merits[1]) < reader.margin:
        return "-1"
    return "1" if merits[1] > merits[0] else "0"


def score(reader, text):
    """Words -> "0.00" to "1.00", or "unknown"."""
    merit = reader.merit(find_value(reader, text, 1))
    share = (merit - reader.worst) / (reader.best - reader.worst)
    return f"{min(1, max(0, share)):.2f}" if np.isfinite(share) else "unknown"


class BadQuestion(Exception):
    """Becomes an HTTP 400 with this text."""


def chance(*what):
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def answer(parts, mistakes=0.0, unsure=0.0, seed=0):
    """parts: list of str | (H, W, 3) uint8 -> the text a model would have written."""
    text = "\n".join(part for part in parts if isinstance(part, str))
    images = [part for part in parts if not isinstance(part, str)]
    goals = [goal for goal in READERS if goal in text]
    if not goals:
        known = "; ".join(f'"{goal}"' for goal in READERS if goal != SIGHT)
        raise BadQuestion(f"the offline stand-in is not a VLM and knows only these goals: {known}")
    reader = READERS[goals[-1]]
    if len(images) > 2:
        raise BadQuestion("the offline stand-in takes one image or two")
    if not images and "Image 2:" in text:
        return f"{SAYS} From the notes.\n{decide(reader, text)}"
    if not images:
        return f"{SAYS} From the notes.\n{score(reader, text)}"
    draw = [seed, goals[-1], *(hashlib.sha256(image.tobytes()).hexdigest() for image in images)]
    sure = goals[-1] != SIGHT  # the sight check tests the line, not the eyes: never a lie there
    words = describe(reader, images, lie=sure and chance("lie", *draw) < mistakes,
                     doubt=sure and chance("doubt", *draw) < unsure)
    if "-1" in text:
        return f"{SAYS}\n{words}\n{decide(reader, words)}"
    if "from 0" in text and len(images) == 1:
        return f"{SAYS}\n{words}\n{score(reader, words)}"
    return f"{SAYS}\n{words}"


# ---- the wire formats: read(body) -> parts, write(...) -> body, fail(...) -> error body ----

def picture(data, declared=None):
    """base64 -> (H, W, 3) uint8; refuses what the real servers refuse."""
    raw = base64.b64decode(data, altchars=b"-_" if "-" in data or "_" in data else None)
    actual = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
    kind = next((name for magic, name in actual.items() if raw.startswith(magic)), "unknown")
    if declared != kind:
        raise BadQuestion(f"the image was said to be {declared} but appears to be {kind}")
    try:
        return np.ascontiguousarray(iio.imread(raw, mode="RGB"))
    except (OSError, ValueError):
        raise BadQuestion("the image cannot be decoded") from None


def data_url(url):
    found = re.fullmatch(r"data:(image/\w+);base64,(.+)", url, re.DOTALL)
    if not found:
        raise BadQuestion("only data: URLs with base64 are taken, nothing is fetched")
    return picture(found.group(2), found.group(1))


def flat(content, one):
    """A string, or a list of typed parts -> list of str | image."""
    return [content] if isinstance(content, str) else [one(part) for part in content]


def read_chat(body):
    return [part for message in body["messages"] for part in flat(message["content"], lambda p:
            p["text"] if p["type"] == "text" else data_url(p["image_url"]["url"]))]


def write_chat(text, end, tokens):
    message = {"role": "assistant", "content": None if end == "refused" else text,
               "refusal": text if end == "refused" else None}
    choices = [{"index": 0, "message": message, "logprobs": None,
                "finish_reason": "length" if end == "cut off" else "stop"}]
    return {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": NAME,
            "choices": [] if end == "empty" else choices,
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1],
                      "total_tokens": sum(tokens)}}


def read_responses(body):
    turns = [{"content": body["input"]}] if isinstance(body["input"], str) else body["input"]
    return [part for turn in turns for part in flat(turn["content"], lambda p:
            p["text"] if p["type"] == "input_text" else data_url(p["image_url"]))]


def write_responses(text, end, tokens):
    content = ({"type": "refusal", "refusal": text} if end == "refused" else
               {"type": "output_text", "text": text, "annotations": []})
    message = {"type": "message", "id": "msg_0", "role": "assistant", "content": [content],
               "status": "incomplete" if end == "cut off" else "completed"}
    return {"id": "resp_0", "object": "response", "created_at": 0, "model": NAME, "error": None,
            "output": [] if end == "empty" else [message], "parallel_tool_calls": False,
            "tool_choice": "auto", "tools": [], "status": message["status"],
            "incomplete_details": {"reason": "max_output_tokens"} if end == "cut off" else None,
            "usage": {"input_tokens": tokens[0], "output_tokens": tokens[1],
                      "total_tokens": sum(tokens), "input_tokens_details": {"cached_tokens": 0},
                      "output_tokens_details": {"reasoning_tokens": 0}}}


def read_gemini(body):
    parts = []
    for part in (part for turn in body["contents"] for part in turn["parts"]):
        blob = part.get("inline_data") or part.get("inlineData")  # both spellings are legal
        parts.append(picture(blob["data"], blob.get("mime_type") or blob.get("mimeType"))
                     if blob else part["text"])
    return parts


def write_gemini(text, end, tokens):
    usage = {"promptTokenCount": tokens[0], "candidatesTokenCount": tokens[1],
             "totalTokenCount": sum(tokens)}
    if end in ("refused", "empty"):  # no candidates at all, in both cases
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}} if end == "refused" else {}
        return {**blocked, "usageMetadata": usage, "modelVersion": NAME}
    return {"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]},
                            "finishReason": "MAX_TOKENS" if end == "cut off" else "STOP"}],
            "usageMetadata": usage, "modelVersion": NAME, "responseId": "0"}


def read_messages(body):
    if "max_tokens" not in body:
        raise BadQuestion("max_tokens: field required")
    return [part for message in body["messages"] for part in flat(message["content"], lambda p:
            p["text"] if p["type"] == "text" else
            picture(p["source"]["data"], p["source"]["media_type"]))]


def write_messages(text, end, tokens):
    stop = {"complete": "end_turn", "cut off": "max_tokens", "refused": "refusal"}
    content = [{"type": "text", "text": text, "citations": None}] if end != "empty" else []
    return {"id": "msg_0", "type": "message", "role": "assistant", "model": NAME,
            "content": content, "stop_reason": stop.get(end, "end_turn"), "stop_sequence": None,
            "usage": {"input_tokens": tokens[0], "output_tokens": tokens[1]}}


def fail_openai(status, kind, message, wait):
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def fail_gemini(status, kind, message, wait):
    name = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{wait}s"}]
    if kind == "insufficient_quota":
        details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                    "violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}]
    return {"error": {"code": status, "message": message, "status": name.get(status, "UNAVAILABLE"),
                      "details": details if status == 429 and (wait or "quota" in kind) else []}}


def fail_messages(status, kind, message, wait):
    details = {"error_code": "enforced_spend_limit_reached"} if kind == "insufficient_quota" else None
    kind = "rate_limit_error" if kind == "insufficient_quota" else kind
    return {"type": "error", "error": {"type": kind, "message": message, "details": details},
            "request_id": "req_0"}


Wire = namedtuple("Wire", "ending read write fail")
WIRES = (Wire("/chat/completions", read_chat, write_chat, fail_openai),
         Wire("/responses", read_responses, write_responses, fail_openai),
         Wire(":generateContent", read_gemini, write_gemini, fail_gemini),
         Wire("/messages", read_messages, write_messages, fail_messages))


# ---- faults on demand ----

# What a good client survives by asking again; faults=0.2 draws one of these for a try in five.
TRANSIENT = ("429", "429 hint", "500", "503 HTML", "529", "drop before", "drop middle", "hang",
             "drip", "invalid JSON", "error under 200")
# name: (status, type, message), of errors after which asking again is of no use
HOPELESS = {"wrong key": (401, "authentication_error", "Incorrect API key provided"),
            "unknown model": (404, "not_found_error", "The model does not exist"),
            "quota gone": (429, "insufficient_quota", "You exceeded your current quota")}
# name: (how it ends, what becomes of the text)
STRANGE = {
    "empty choices": ("empty", lambda text: ""),
    "cut off": ("cut off", lambda text: text[:20]),
    "refusal": ("refused", lambda text: "I cannot help with that."),
    "think closed": ("complete", lambda text: f"<think>0 or 1? Say 1, or 0.</think>{text}"),
    "think unclosed": ("complete", lambda text: f"<think>Let me see. {text}"),
    "100% sure": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", r"\n100% sure: \1", text)),
    "0.5": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", "\n0.5", text)),
    "minus sign": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", "\n\u22121", text)),
}
FAULTS = (*TRANSIENT, *HOPELESS, *STRANGE)


class Handler(BaseHTTPRequestHandler):
    """One connection. self.server.vlm is the OfflineVLM."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True  # trap: else a small body waits 40 ms for an acknowledgement
    wbufsize = 1 << 16  # header and body leave together

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send(404, {"error": {"message": f"{SAYS} POST a question to /v1/chat/completions"}})

    def do_POST(self):
        vlm = self.server.vlm
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wire = next((wire for wire in WIRES if self.path.split("?")[0].endswith(wire.ending)), None)
        if wire is None:
            return self.do_GET()
        digest, fault = vlm.register(raw, self.path, self.headers)
        vlm.stopping.wait(vlm.latency)
        if fault in HOPELESS or not vlm.key_fits(self.headers):
            status, kind, message = HOPELESS.get(fault, HOPELESS["wrong key"])
            return self.send(status, wire.fail(status, kind, message, None))
        try:
            body = json.loads(raw)
            if body.get("stream"):
                raise BadQuestion("streaming is not offered: leave stream out")
            parts = wire.read(body)
            text = answer(parts, vlm.mistakes, vlm.unsure, vlm.seed)
        except BadQuestion as error:
            return self.send(400, wire.fail(400, "invalid_request_error", str(error), None))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"the body is not understood: {error!r}"
            return self.send(400, wire.fail(400, "invalid_request_error", why, None))
        end, change = STRANGE.get(fault, ("complete", lambda text: text))
        text = change(text)
        # As many tokens as GPT-5 would count for an image; four characters of text are one token.
        tokens = (sum(len(part) // 4 if isinstance(part, str) else
                      -(-part.shape[0] // 32) * -(-part.shape[1] // 32) for part in parts),
                  len(text) // 4)
        self.reply(wire, fault, wire.write(text, end, tokens), digest)

    def reply(self, wire, fault, good, digest):
        """Send the good answer, or what the fault makes of it."""
        vlm, code = self.server.vlm, json.dumps(good).encode()
        if fault == "503 HTML":
            page = b"<html><head><title>Service Unavailable</title></head></html>"
            self.send(503, page, "text/html")
        elif fault in ("429", "429 hint", "500", "529"):
            status, wait = int(fault[:3]), 0.05 if fault == "429 hint" else None
            kind = "rate_limit_error" if status == 429 else "overloaded_error"
            # Gemini hints in the body only
            header = wait if wire.fail is not fail_gemini else None
            self.send(status, wire.fail(status, kind, "Slow down, please", wait), wait=header)
        elif fault == "drop before":
            self.close_connection = True
        elif fault == "hang":
            vlm.stopping.wait(vlm.hang)
            self.close_connection = True
        elif fault == "invalid JSON":
            self.send(200, code[:-20])
        elif fault == "error under 200":
            self.send(200, fail_messages(200, "overloaded_error", "Overloaded", None))
        elif fault in ("drop middle", "drip"):
            self.head(200, len(code))
            for place in range(len(code) // 2 if fault == "drop middle" else len(code)):
                self.wfile.write(code[place:place + 1])
                self.wfile.flush()
                if fault == "drip":
                    vlm.stopping.wait(vlm.drip)
            self.close_connection = fault == "drop middle"
        else:
            with vlm.lock:
                vlm.answers[digest] += 1
            self.send(200, code)

    def send(self, status, body, kind="application/json", wait=None):
        code = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, len(code), kind, wait)
        self.wfile.write(code)
        self.wfile.flush()

    def head(self, status, length, kind="application/json", wait=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if wait is not None:
            self.send_header("Retry-After", str(wait))
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 128  # trap: the default of 5 makes a burst of workers wait a second

    def handle_error(self, request, address):
        pass  # a client that gave up on a drip is no news


class OfflineVLM:
    """The stand-in as an object: with OfflineVLM(mistakes=0.1) as url: ...

    port: 0 picks a free one.  mistakes, unsure: shares of the questions.  latency: seconds.
    faults: share of tries that meet a transient fault, or the name of one of FAULTS, which then
    meets the first try of every question.  key: what the caller's key must be, if anything.
    requests, answers: Counters, hash of the body -> times asked, times answered without a fault.
    last: (path, headers, body) last received.  model: a name that tells its settings.
    """

    hang, drip = 5.0, 0.05  # seconds of silence; seconds between two bytes

    def __init__(self, port=0, mistakes=0.0, unsure=0.0, latency=0.0, faults=0.0, seed=0, key=None):
        if isinstance(faults, str) and faults not in FAULTS:
            raise ValueError(f"no fault {faults!r}: use a share or one of {', '.join(FAULTS)}")
        self.port, self.mistakes, self.unsure, self.latency = port, mistakes, unsure, latency
        self.faults, self.seed, self.key = faults, seed, key
        self.requests, self.answers, self.last = Counter(), Counter(), None
        # Whatever changes its answers is in its name, so that a cache of answers never mixes them up.
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:6]
        self.model = f"{NAME}-{version}-mistakes{mistakes}-unsure{unsure}-seed{seed}"
        self.lock, self.stopping = threading.Lock(), threading.Event()

    def start(self):
        """-> base URL, such as http://127.0.0.1:8080/v1"""
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.vlm = self
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def stop(self):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def register(self, raw, path, headers):
        """Count a request -> hash of its body, the fault it meets or None."""
        digest = hashlib.sha256(raw).hexdigest()
        with self.lock:
            self.requests[digest] += 1
            attempt = self.requests[digest]
            self.last = path, dict(headers), raw
        if isinstance(self.faults, str):
            return digest, self.faults if attempt == 1 else None
        if chance("fault", self.seed, digest, attempt) >= self.faults:
            return digest, None
        return digest, TRANSIENT[int(chance("which", self.seed, digest, attempt) * len(TRANSIENT))]

    def key_fits(self, headers):
        given = (headers.get("x-goog-api-key"), headers.get("x-api-key"),
                 headers.get("Authorization", "").removeprefix("Bearer "))
        return self.key is None or self.key in given


def main():
    parser = argparse.ArgumentParser(description=f"A stand-in for a VLM on loopback {SAYS}.")
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    for name in ("mistakes", "unsure", "latency", "faults"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    vlm = OfflineVLM(**options)
    print(f"{SAYS} listens on {vlm.start()}", flush=True)
    print("Expect no understanding: it measures pixels, for these goals only:")
    for goal in READERS:
        print(f'  "{goal}"')
    print("Ask it with: python vlm_query.py a.png b.png --goal ... --vlm offline --vlm-url URL")
    print("Ctrl-C stops it.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        vlm.stop()


if __name__ == "__main__":
    main()
