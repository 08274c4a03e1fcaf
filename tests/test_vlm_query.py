"""vlm_query.py: what the lesson leaves out. Faults of servers, waiting, keys, costs, logs, pictures."""
import email.utils
import gzip
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
import types
import zlib

import numpy as np
import pytest

from support import offline_vlm
import vlm_query
from support.offline_vlm import OfflineVLM
from test_components import BRIGHT, KEY, gray, grays, quick, says
from test_offline_vlm import POLE, draw_poles
from vlm_query import LabelLog, VLM, VLMError, label_pairs

# fault of the stand-in -> what one pair, whose right label is 1, must come out as
FAULT_ROWS = {**dict.fromkeys(offline_vlm.TRANSIENT, (1, "label")),
              "wrong key": "check the key", "unknown model": "check the model's name",
              "quota gone": "waiting does not help",
              "empty choices": (-2, "no answer"), "cut off": (-2, "no answer"), "refusal": (-2, "no answer"),
              "think closed": (1, "label"), "think unclosed": (-2, "no answer"), "100% sure": (1, "label"),
              "half": (-2, "unreadable"), "minus sign": (-1, "unsure")}


@pytest.mark.parametrize("provider", ["openai/m", "gemini/m", "anthropic/m"])
@pytest.mark.parametrize("fault", offline_vlm.FAULTS)
def test_each_fault_has_the_outcome_that_the_table_names(fault, provider):
    """Passing faults must cost nothing but time, hopeless ones must stop at once, odd answers are no label."""
    server = OfflineVLM(faults=fault)
    server.hang, silent = 1.0, fault in ("hang", "drip")
    with server as url:
        vlm, records = quick(url, provider, timeout=(10, 0.3 if silent else 60)), []
        if isinstance(FAULT_ROWS[fault], str):
            with pytest.raises(VLMError, match=FAULT_ROWS[fault]):
                label_pairs(vlm, gray(9), gray(200), BRIGHT, log=records.append)
            assert server.requests.total() == 1 and not records
        else:
            labels, _ = label_pairs(vlm, gray(9), gray(200), BRIGHT, log=records.append)
            assert (labels[0], records[0]["kind"]) == FAULT_ROWS[fault]
            again = 1 if fault in offline_vlm.TRANSIENT else 0
            least = len(records[0]["answers"]) * (1 + again)
            # on a busy machine a good answer may be late too, and is then asked for once more
            assert server.requests.total() >= least if silent else server.requests.total() == least


def test_a_thousand_pairs_at_a_fault_rate_of_a_fifth_get_the_labels_of_a_good_day():
    """Every label must equal the right one, though one try in five meets a fault."""
    first, second, right = grays(1000)
    server = OfflineVLM(faults=0.2, seed=3)
    server.drip = 0.02
    with server as url:
        vlm = quick(url, timeout=(2, 0.2))
        labels, counts = label_pairs(vlm, first, second, BRIGHT, stages=1, workers=16)
    assert (labels == right).all() and counts["asked"] == 1000
    assert server.requests.total() > 1150  # the faults did happen


def test_a_server_that_stays_down_is_no_answer_and_then_the_end_but_never_unsure():
    """After its deadline a question must count as "no answer"; most of a batch so must stop the run."""
    with OfflineVLM(faults=1.0) as url:
        vlm = quick(url, deadline=0.1, timeout=(2, 0.1))
        labels, counts = label_pairs(lambda parts: vlm.ask(parts), gray(1, 1), gray(200, 210), BRIGHT)
        assert list(labels) == [-2, -2] and counts["no_answer"] == 2 and counts["unsure"] == 0
        with pytest.raises(VLMError, match="gives no answer"):
            label_pairs(vlm, gray(1, 2, 3, 4, 5), gray(*range(201, 206)), BRIGHT)


def test_failures_are_never_cached_and_torn_files_are_asked_again(tmp_path):
    """What is in the cache must be an answer, whole."""
    parts = ["The goal is " + BRIGHT, "Image 1:", gray(1)[0]]
    server = OfflineVLM(faults="503 HTML")
    with server as url:
        assert quick(url, cache=tmp_path, deadline=0).ask(parts).end.startswith("unreachable: HTTP 503")
        assert list(tmp_path.iterdir()) == []
        vlm = quick(url, cache=tmp_path)
        text = vlm.ask(parts).text
        file, = tmp_path.iterdir()
        for damage in (file.read_bytes()[:50], b"\0" * 9, b"[]"):
            file.write_bytes(damage)
            assert vlm.ask(parts)[0::4] == (text, False)
        assert vlm.ask(parts)[0::4] == (text, True)


def test_the_cache_tells_models_bodies_and_servers_apart(tmp_path):
    """Another model, extra or URL must be asked anew."""
    server = OfflineVLM()
    with server as url:
        for settings in ({"provider": "local/a"}, {"provider": "local/b"}, {"provider": "openai/a"},
                         {"provider": "local/a", "extra": {"seed": 1}}, {"provider": "local/a"},
                         {"provider": "local/a", "url": url.replace("127.0.0.1", "localhost")}):
            quick(**{"url": url, "cache": tmp_path, **settings}).ask(["The goal is " + BRIGHT])
    assert server.requests.total() == 5


def test_keys_are_in_no_file_log_message_or_traceback(tmp_path, capfd, monkeypatch):
    """The key must not leave the request's header, even where the provider quotes it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(offline_vlm.HOPELESS, "wrong key", (401, "authentication_error", f"bad key {'x' * 280}{KEY}"))
    said = []
    with OfflineVLM(key="another") as url:
        log = LabelLog(tmp_path / "labels.jsonl")
        for broken in ({}, {"key": KEY + "\n"}, {"key": KEY + "\u2713"}, {"url": "http://127.0.0.1:9/v1"},
                       {"url": f"http://u:{KEY}@h/v1"}, {"url": f"http://h/v1?key={KEY}"}):
            try:
                vlm = VLM("openai/m", **{"url": url, "cache": tmp_path, "deadline": 0, **broken})
                said.append(repr(vlm) + str(label_pairs(vlm, gray(1), gray(99), BRIGHT, log=log.append)))
            except VLMError as error:
                said.append(str(error) + repr(error.__context__) + repr(error.__cause__))
    assert len(said) == 6 and "[key]" in said[0] and not any("\n" in text for text in said[1:3])
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in text for text in files)
    assert KEY not in "".join(said) + "".join(capfd.readouterr())


def test_a_netrc_entry_does_not_replace_the_key(tmp_path, monkeypatch):
    """requests would put a ~/.netrc login in place of our Authorization header."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = OfflineVLM(key=KEY)
    with server as url:
        vlm = quick(url, "openai/m")
        vlm._session.trust_env = True  # as for any host but loopback
        assert vlm.ask(["The goal is " + BRIGHT]).end == "complete"


def test_a_proxy_in_the_environment_is_not_asked_for_loopback(monkeypatch):
    """The stand-in must be reached where the network goes through a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with OfflineVLM() as url:
        assert quick(url, deadline=0).ask(["The goal is " + BRIGHT]).end == "complete"


class Pieces(http.server.BaseHTTPRequestHandler):
    """Answers zipped, in chunks of ten bytes; /moved sends elsewhere."""

    protocol_version, asked = "HTTP/1.1", []

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        moved = self.path.startswith("/moved")
        self.send_response(307 if moved else 200)
        self.send_header("Location", "/v1/chat/completions")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        answer = {"choices": [{"message": {"content": "so: " + "0" * 5000}, "finish_reason": "stop"}]}
        code = gzip.compress(json.dumps(answer).encode())
        for piece in (code[i:i + 10] for i in range(0, len(code), 10)):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


def test_an_answer_in_pieces_is_put_together_and_no_redirect_is_followed():
    """Zipped and chunked bodies must arrive whole; a redirect could hand the key to a stranger."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pieces) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert len(quick(root + "/v1", deadline=0).ask(["hi"]).text) == 5004
        with pytest.raises(VLMError, match="HTTP 307.*check the URL"):
            quick(root + "/moved", deadline=0).ask(["hi"])
        server.shutdown()
    assert Pieces.asked == ["/v1/chat/completions", "/moved/chat/completions"]


def test_retry_after_is_understood_in_every_form():
    """Seconds, floats, dates and Gemini's retryDelay must be waited, nonsense must not."""
    wish = vlm_query.wait_wished
    assert wish({"retry-after": "7"}, {}) == 7 and wish({"retry-after": "0.5"}, {}) == 0.5
    date = email.utils.formatdate(time.time() + 300, usegmt=True)
    assert 200 < wish({"retry-after": date}, {}) <= 300
    assert wish({}, {"details": [{"@type": "x"}, {"retryDelay": "34.5s"}]}) == 34.5
    for nonsense in ("soon", "", "nan", "Mon, 99 Foo"):
        assert wish({"retry-after": nonsense}, {}) is None
    for odd in ([None], ["retryDelay"], {"retryDelay": 34}):  # what gateways pass through
        assert wish({}, {"details": odd}) is None
    assert wish({}, {}) is None and wish({"retry-after": "-3"}, {}) == 0
    assert wish({"retry-after-ms": "250", "retry-after": "1"}, {}) == 0.25


def test_one_thread_told_to_wait_makes_all_wait():
    """After a 429 with a hint, no thread may send before the hinted moment; past the deadline none waits."""
    server = OfflineVLM()
    with server as url:
        vlm = quick(url)
        vlm._judge(200, {}, "{}")
        vlm._not_before = time.monotonic() + 0.3
        began = time.monotonic()
        label_pairs(vlm, *grays(4)[:2], BRIGHT, workers=4)
        assert 0.3 < time.monotonic() - began < 60
        vlm._not_before, vlm.deadline = time.monotonic() + 3600, 60
        assert "told to wait, 0 tries; 3600 s more" in vlm.ask(["The goal is " + BRIGHT + "!"]).end


def test_a_hint_sets_the_moment_before_which_nobody_asks():
    """The shared moment must come from the hint, for each provider's way to give it."""
    for provider in ("openai/m", "gemini/m", "anthropic/m"):
        with OfflineVLM(faults="429 hint") as url:
            vlm, began = quick(url, provider), time.monotonic()
            assert vlm.ask(["The goal is " + BRIGHT]).end == "complete"
            assert 0.04 < vlm._not_before - began < 30


def test_a_server_that_always_says_0_seconds_meets_the_deadline():
    """A hint of 0 leaves nothing to wait for: without a look at the clock it would be asked for ever."""
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1", deadline=1)
    vlm.backoff, tries = 0.01, []
    vlm._post = lambda body: tries.append(1) or (429, {"retry-after": "0"}, "{}")
    began = time.monotonic()
    assert "past the deadline" in vlm.ask(["hi"]).end and time.monotonic() - began < 60 and 1 < len(tries) < 5000


@pytest.mark.parametrize("status, body, match", [
    (200, "<html><title>Log in</title></html>", "web page .Log in.: check the URL"),
    (200, '{"type": "error", "error": {"type": "authentication_error", "message": "no"}}', "HTTP 401"),
    (200, '{"error": {"code": 403, "message": "no"}}', "HTTP 403"), (403, '{"message": "No key found"}', "No key found"),
    (301, "", "check the URL"), (407, "", "check the proxy"), (413, '{"detail": [{"msg": "too big"}]}', "too big"),
    (400, '[{"error": {"code": 400, "message": "API key not valid"}}]', "API key not valid"),
    (404, '{"error": "model \'x\' not found"}', "model 'x' not found.*check the model's name")])
def test_what_cannot_be_cured_by_asking_again_stops_with_the_providers_words(status, body, match):
    """Five shapes of error bodies, under any status, must end in one line that names the cure."""
    with pytest.raises(VLMError, match=match) as caught:
        VLM("local/m", url="http://127.0.0.1:1/v1")._judge(status, {}, body)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status, body", [
    (200, '{"error": {"type": "overloaded_error", "message": "busy"}}'), (200, '{"choices": [{"mess'),
    (200, ""), (200, "[" * 200_000), (200, '{"error": {"code": "\u00b2", "message": "x"}}'), (500, "Error"), (408, ""), (409, ""), (529, "{}"), (502, "<html>"),
    (429, '{"error": {"status": "RESOURCE_EXHAUSTED", "message": "check your plan and billing details"}}')])
def test_what_may_pass_is_asked_again(status, body):
    """Overload in any dress must lead to a retry, Gemini's per-minute limit with its talk of billing too."""
    why, wish = VLM("local/m", url="http://127.0.0.1:1/v1")._judge(status, {}, body)
    assert why.startswith(f"HTTP {status} ") and wish is None


def test_thinking_and_refusals_are_read_in_each_format():
    """Thought parts must be left out, their tokens counted; a refusal under HTTP 200 is no answer."""
    parts = [{"text": "hm", "thought": True}, {"text": "1"}]
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 40}
    answer = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "usageMetadata": usage}
    assert vlm_query.gemini_read(answer) == ("1", "complete", 5, 42)
    assert vlm_query.gemini_read({"promptFeedback": {"blockReason": "SAFETY"}})[1] == "refused"
    answer["candidates"][0] = {"finishReason": "MAX_TOKENS"}
    assert vlm_query.gemini_read(answer)[:2] == ("", "cut off")
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "0"}]
    usage = {"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 3}
    answer = {"content": content, "stop_reason": "end_turn", "usage": usage}
    assert vlm_query.anthropic_read(answer) == ("0", "complete", 3, 3)
    answer = {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}
    assert vlm_query.openai_read(answer)[1] == "cut off"
    assert vlm_query.gemini_read({"candidates": [{"finishReason": "RECITATION"}]})[1] == "refused"
    assert vlm_query.anthropic_read({"content": [], "stop_reason": "max_tokens"})[1] == "cut off"
    with OfflineVLM() as url:
        vlm = quick(url)
        assert vlm._read('{"error": {"code": "content_filter"}}')[1] == "refused"
        assert vlm._judge(400, {}, '{"error": {"code": "content_filter"}}') == ("", None)


@pytest.mark.parametrize("end", ["error", "abort", "network_error"])
def test_an_end_that_is_the_servers_fault_is_not_kept(tmp_path, end):
    """OpenRouter's "error" and vLLM's "abort" must be no answer, and must be asked again the next time."""
    body = {"choices": [{"message": {"content": "0"}, "finish_reason": end}], "usage": {"prompt_tokens": 5}}
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1", cache=tmp_path)
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"])[1:5] == ("failed", 5, 0, False)
    body["choices"][0]["finish_reason"] = "stop"
    assert vlm.ask(["hi"]) == ("0", "complete", 5, 0, False, None) and vlm.ask(["hi"]).cached


@pytest.mark.parametrize("said, meant", [(float("nan"), 0), ([1], 0), ("x", 0), (-3, 0), (None, 0), (7.0, 7)])
def test_odd_token_counts_lose_no_answer(said, meant):
    """What is no number of tokens must count as none, and the answer that was paid for must come through."""
    body = {"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": said}}
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1")
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"]) == ("0", "complete", meant, 0, False, None)


@pytest.mark.parametrize("provider, body", [
    ("local/m", {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}),
    ("gemini/m", {"usageMetadata": {"promptTokenCount": 5, "thoughtsTokenCount": 2}}),
    ("anthropic/m", {"content": [], "usage": {"input_tokens": 5, "output_tokens": 2}})])
def test_an_empty_answer_costs_what_it_says(provider, body):
    """Tokens of an answer without choices must be in the books, or max_usd would never be met."""
    vlm = VLM(provider, url="http://127.0.0.1:1/v1", key=KEY)
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"]) == ("", "empty", 5, 2, False, None) and vlm.tokens_in == 5


@pytest.mark.parametrize("url", ["http://localhost:abc/v1", "http://localhost:99999/v1", "http://local host/v1",
                                 "http://.foo/v1", "http://[::1/v1", "localhost:8000/v1", "http://a/v1#f", "http://a#f"])
def test_a_mistyped_url_is_refused_at_once(url):
    """None of these can ever answer: no waiting, no traceback."""
    with pytest.raises(VLMError, match="needs its server's URL"):
        VLM("local/m", url=url)


def test_answers_under_way_are_kept_when_another_question_ends_the_batch(tmp_path):
    """The quota ends while seven answers are on their way: they are paid for, so all must be in the cache."""
    first, second, _ = grays(11)
    vlm, asked = VLM("local/m", url="http://127.0.0.1:1/v1", cache=tmp_path), []

    def post(body):
        asked.append(body)
        if len(asked) == 8:
            time.sleep(0.05)
            return 429, {}, '{"error": {"code": "insufficient_quota", "message": "quota"}}'
        time.sleep(2)  # long enough for eight threads to have begun, and for the failure to be heard
        return 200, {}, '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}'

    vlm._post, vlm._turns.limit = post, 8
    with pytest.raises(VLMError, match="the quota is used up"):
        label_pairs(vlm, first, second, BRIGHT, stages=1)
    assert len(asked) == 8 and len(list(tmp_path.iterdir())) == 7


def test_whatever_goes_wrong_in_a_thread_is_heard():
    """SystemExit in an ask() must end label_pairs, not hang it; and nobody can ask with no threads."""
    first, second, _ = grays(3)
    with pytest.raises(SystemExit):
        label_pairs(lambda parts: sys.exit(3), first, second, BRIGHT)
    for wrong in ({"workers": 0}, {"stages": 3}):
        with pytest.raises(ValueError, match="stages must be 1 or 2, and workers at least 1"):
            label_pairs(says("1"), first, second, BRIGHT, **wrong)
    with pytest.raises(ValueError, match=r"images of one size.*\(3, 40, 40, 3\)"):
        label_pairs(says("1"), first, np.zeros((3, 40, 40, 3), np.uint8), BRIGHT)
    with pytest.raises(ValueError, match="float64"):
        label_pairs(says("1"), first / 255, second / 255, BRIGHT)


def test_the_spend_limit_holds_in_pair_order(tmp_path):
    """With max_usd the labels must be the same on every run, and the overshoot less than a block."""
    first, second, _ = grays(40)
    ends = []
    with OfflineVLM(latency=0.002) as url:
        for repeat in range(3):
            vlm = quick(url, max_usd=0.002, usd_per_mtok=(10, 0))
            vlm.block = 4
            labels, counts = label_pairs(vlm, first, second, BRIGHT, stages=1, workers=2)
            ends.append(counts["limit"])
            assert label_pairs(vlm, first, second, BRIGHT)[1]["asked"] == 0
    silent = VLM("local/m", url="http://127.0.0.1:1/v1", max_usd=1.0, usd_per_mtok=(10, 0))
    silent._post = lambda body: (200, {}, '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}')
    silent.cache = tmp_path
    with pytest.raises(VLMError, match="does not say how many tokens.*use max_calls"):
        silent.ask(["hi"])
    assert len(list(tmp_path.iterdir())) == 1  # it was paid for, so it is kept
    per_pair = vlm.usd / counts["asked"]
    assert ends[0] == ends[1] == ends[2] > 0 and 0.002 <= vlm.usd <= 0.002 + 4 * per_pair


def test_the_sight_check_is_asked_at_every_start(tmp_path):
    """Neither a right nor a wrong answer may come from the cache: the server may be another one, or cured, by now."""
    with OfflineVLM() as url:
        for _ in range(2):
            vlm = quick(url, cache=tmp_path)
            vlm.check_sight()
            assert (vlm.calls, vlm.cached_calls) == (2, 0) and vlm.cache == tmp_path
    assert not list(tmp_path.iterdir())


def test_totals_survive_a_checkpoint():
    """state_dict must bring back everything that limits are measured by."""
    with OfflineVLM() as url:
        vlm = quick(url, usd_per_mtok=(1, 2))
        vlm.check_sight()
        other = quick(url, usd_per_mtok=(1, 2))
        other.load_state_dict(json.loads(json.dumps(vlm.state_dict())))
    assert other.usd == vlm.usd > 0 and other.calls == 2


def test_eight_workers_ask_side_by_side():
    """Waiting must overlap: no question is answered before eight have arrived, or after a minute none is."""
    class Meeting(OfflineVLM):
        everyone = threading.Barrier(8)

        def register(self, raw, path, headers):
            self.everyone.wait(60)
            return super().register(raw, path, headers)

    first, second, right = grays(8)
    server = Meeting()
    with server as url:
        vlm = quick(url, workers=8)
        vlm._turns.limit = 8  # as after a few quick answers
        labels, _ = label_pairs(vlm, first, second, BRIGHT, workers=8)
    assert (labels == right).all() and server.requests.total() == 16


def test_a_fatal_error_wakes_the_threads_that_wait():
    """When the key is refused, nobody may go on sleeping towards a retry, and nothing new may begin."""
    with OfflineVLM(faults="quota gone") as url:
        vlm, began, order = quick(url), time.monotonic(), iter(range(99))
        real = vlm._send

        def send(body, deadline, stop):  # the first question sits in a long wait, the second one fails
            if next(order):
                time.sleep(0.1)
                return real(body, deadline, stop)
            vlm._wait(time.monotonic() + 50, time.monotonic() + 60, stop, "")

        vlm._send = send
        with pytest.raises(VLMError, match="waiting does not help"):
            label_pairs(vlm, *grays(12)[:2], BRIGHT, workers=2)
    assert time.monotonic() - began < 40 and next(order) <= 4


def test_waits_double_up_to_a_minute_and_differ_between_threads(monkeypatch):
    """Full jitter: random() times 1, 2, 4, ... 60 seconds; a fixed wait would send all threads at once."""
    vlm, waits = VLM("local/m", url="http://127.0.0.1:9/v1"), []
    vlm._post = lambda body: (503, {}, "")

    def wait(moment, give_up, stop, why):
        waits.append(round(moment - now, 1))
        if len(waits) == 10:
            raise TimeoutError("enough")

    vlm._wait = wait
    monkeypatch.setattr(vlm_query.random, "random", lambda: 0.5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)  # the clock stands still: no wait depends on the machine
    assert vlm.ask(["hi"]).end == "unreachable: enough"
    assert waits[1:] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_ctrl_c_ends_at_once_though_threads_wait_for_answers(tmp_path):
    """Nobody must have to wait for a server that takes two minutes."""
    for name, image in zip("ab", gray(20, 220)):
        vlm_query.iio.imwrite(tmp_path / f"{name}.png", image)
    server = OfflineVLM(latency=120)
    with server as url:
        command = [sys.executable, vlm_query.__file__, tmp_path / "a.png", tmp_path / "b.png", "--goal", BRIGHT]
        # trap: what a shell starts in the background (as a CI may) has Ctrl-C switched off, and its children as well
        process = subprocess.Popen([*command, "--vlm-url", url], stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not server.last:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=100)[1] == "vlm_query.py: stopped\n" and process.returncode == 2


def test_a_torn_last_line_is_dropped_and_the_next_record_starts_clean(tmp_path):
    """A crash in the middle of a line must cost that line only, and keep=N must cut after N records."""
    path = tmp_path / "labels.jsonl"
    log = LabelLog(path)
    for number in range(3):
        log.append({"n": number, "text": "\ud800\u2028\n"})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "te')
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1, 2]
    LabelLog(path).append({"n": 4})
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1, 2, 4]
    LabelLog(path, keep=2).close()
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1]


@pytest.mark.parametrize("bad", [b"\x00\xff\xfe garbage\n", b"[1, 2]\n", b"[" * 100_000 + b"\n"])
def test_a_log_with_garbage_is_refused_and_left_as_it_is(tmp_path, bad):
    """Binary garbage must end in one line that names its place, and must not be cut away."""
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad)
    for use in (LabelLog.read, LabelLog):
        with pytest.raises(VLMError, match="labels.jsonl: line 2 is not a label record"):
            use(path)
    assert path.read_bytes() == b'{"a": 1}\n' + bad


def test_scores_of_single_pictures_follow_the_goal():
    """score_images must give brighter pictures higher scores, in one call or two."""
    with OfflineVLM() as url:
        for stages in (1, 2):
            scores, counts = vlm_query.score_images(quick(url), gray(0, 51, 255), BRIGHT, stages)
            assert list(scores) == [0.0, 0.2, 1.0] and counts["scored"] == 3
    scores, _ = vlm_query.score_images(says("70"), gray(1), "g")
    assert np.isnan(scores).all() and vlm_query.parse_score("so: 0.25.") == 0.25


def huge_png(path, side=20_000):
    """A small file whose header says side x side."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)))


def test_the_command_line_labels_two_files_with_the_stand_in(tmp_path, capsys):
    """It must start the stand-in beside it, print what was seen, and decide."""
    files = [str(tmp_path / name) for name in ("dark.png", "light.png")]
    for file, image in zip(files, gray(20, 220)):
        vlm_query.iio.imwrite(file, image)
    assert vlm_query.main([*files, "--goal", BRIGHT]) == 0
    out = capsys.readouterr().out
    assert "mean brightness of 220" in out and "light.png is closer" in out


@pytest.mark.parametrize("first, flags, words", [
    ("text", (), "not an image"), ("huge", (), "exceeds limit"), ("none", (), "not an image"),
    ("light", ("--vlm", "openai/m"), "set OPENAI_API_KEY"), ("light", ("--vlm", "x/m"), "unknown VLM"),
    ("light", (), "knows only these goals")])
def test_mistakes_on_the_command_line_end_in_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, first, flags, words):
    """A text file, a bomb, a missing file, a missing key and an unknown goal must not end in a traceback."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "text.png").write_text("not an image")
    huge_png(tmp_path / "huge.png")
    for name, image in zip(("dark.png", "light.png"), gray(20, 220)):
        vlm_query.iio.imwrite(tmp_path / name, image)
    with OfflineVLM() as url:
        flags = flags or ("--vlm-url", url)
        files = [str(tmp_path / f"{name}.png") for name in (first, "dark")]
        assert vlm_query.main([*files, "--goal", "to fly", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1, err


def test_of_a_gif_the_first_picture_is_taken(tmp_path):
    """A GIF of one picture or of several is a picture, and its width counts."""
    pictures = gray(20, 220, 90)
    for many in (pictures[:1], pictures):
        vlm_query.iio.imwrite(tmp_path / "a.gif", many)
        assert np.array_equal(vlm_query.load_image(tmp_path / "a.gif"), pictures[0])
    vlm_query.iio.imwrite(tmp_path / "wide.gif", np.zeros((2, 8, 6000, 3), np.uint8))
    with pytest.raises(VLMError, match="6000 x 8 pixels is too large"):
        vlm_query.load_image(tmp_path / "wide.gif")


def test_a_small_file_that_claims_to_be_huge_is_not_unpacked(tmp_path):
    """20,000 x 20,000 pixels must be refused by the header's numbers, in no time."""
    for side, words in ((5000, "5000 x 5000 pixels is too large"), (9000, "9000 x 9000"), (20_000, "exceeds")):
        huge_png(tmp_path / "huge.png", side)
        with pytest.raises(VLMError, match=words):
            vlm_query.load_image(tmp_path / "huge.png")


# ---- soft labels ----
@pytest.mark.parametrize("provider", ["local/m", "gemini/m"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("fault", [0.0, "100% sure", "think closed"])
def test_the_stand_in_tells_how_sure_it_is_in_both_formats(provider, stages, fault):
    """p_second must be the sigmoid of the difference over the reader's margin, so it fits each label."""
    records, margin = [], offline_vlm.READERS[BRIGHT].margin
    first, second = gray(100, 100, 100, 200), gray(110, 90, 255, 200)
    second[3, :4] = 180  # no difference to speak of
    with OfflineVLM(faults=fault) as url:
        labels, _ = label_pairs(quick(url, provider, logprobs=True), first, second, BRIGHT, stages, log=records.append)
    told = [record.get("p_second") for record in sorted(records, key=lambda record: record["pair"])]
    sigmoid = [round(1 / (1 + np.exp(-difference / margin)), 4) for difference in (10, -10)]
    assert labels.tolist() == [1, 0, 1, -1] and told == [*sigmoid, 1.0, None]


@pytest.mark.parametrize("stages", [1, 2])
def test_of_a_mistake_the_stand_in_is_as_sure_as_of_an_answer(stages):
    """A soft label must not give away which answers are wrong on purpose."""
    first, second, right = draw_poles(30)
    records = []
    with OfflineVLM(mistakes=0.4) as url:
        vlm = VLM("offline", url=url, logprobs=True)
        labels, _ = label_pairs(vlm, first, second, POLE, stages, log=lambda record: records.append(record))
    assert 5 < (labels != right).sum() < 20
    assert all((record["p_second"] > 0.5) == record["label"] for record in records)


def test_an_ask_of_ones_own_may_tell_p_second_too():
    """And a Reply of five, as before there was p_second, is still one."""
    records = []
    label_pairs(lambda parts: vlm_query.Reply("1", "complete", 1, 1, False, .8), *gray(9, 99)[:, None], "g", 1, log=records.append)
    label_pairs(lambda parts: vlm_query.Reply("-1", "complete", 1, 1, False, .8), *gray(9, 99)[:, None], "g", 1, log=records.append)
    label_pairs(says("1"), *gray(9, 99)[:, None], "g", 1, log=records.append)
    assert [record.get("p_second") for record in records] == [.8, None, None]


@pytest.mark.parametrize("soft", [False, True])
def test_the_labeler_hands_out_probabilities_in_place_of_labels_where_there_are_any(tmp_path, soft):
    """y must be p_second also where the label, one draw, was the less likely one; 0 or 1 where nobody told; int8 when off."""
    from support.labeler import Labeler

    said = iter([("1", .9), ("0", .7), ("1", None), ("-1", None), ("0", .1)])
    labeler = Labeler("g", lambda parts: vlm_query.Reply(*(word := next(said))[:1], "complete", 1, 1, False, word[1]), 1, 1, soft=soft)
    labeler.log, labeler.folder = LabelLog(tmp_path / "labels.jsonl"), tmp_path
    large = gray(*range(0, 200, 20), size=48)
    images = types.SimpleNamespace(large=large, small=large, progress=np.arange(10.0))
    pairs = np.arange(10).reshape(5, 2)
    first, second, y = labeler(images, pairs, 1, np.random.default_rng(0))
    assert (first == large[[0, 2, 4, 8]]).all() and (second == large[[1, 3, 5, 9]]).all()
    assert np.allclose(y, [.9, .7, 1, .1] if soft else [1, 0, 1, 0]) and y.dtype == (np.float32 if soft else np.int8)
    records = LabelLog.read(tmp_path / "labels.jsonl")
    assert [record["label"] for record in records] == [1, 0, 1, -1, 0]
    assert [record.get("p_second") for record in records] == [.9, .7, None, None, .1] and labeler.counts["labels"] == 4


def test_soft_labels_are_refused_where_nobody_can_tell():
    """The oracle, kept answers and a score have no probabilities: one line."""
    from support import settings

    for fields, leave_out in (({"labels": "oracle"}, "--labels"), ({"labels": "."}, "--labels"), ({"reward": "score"}, "--reward")):
        with pytest.raises(settings.UserError, match=f"--soft-labels 1: only a VLM .* leave out {leave_out}"):
            settings.resolve(settings.Config(soft_labels=1, **fields))
    assert settings.resolve(settings.Config(soft_labels=1)).soft_labels == 1 and settings.Config().soft_labels == 0
