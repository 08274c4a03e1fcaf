"""What a server on the other end of the wire can do: drip, flood, lie, vanish, be slow, quote the key."""
import base64
import concurrent.futures
import contextlib
import gzip
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest


from support import settings
import vlm_query
from vlm_query import VLM, VLMError, label_pairs, printable

KEY = "sk-wire/secret+0123456789"


class Server:
    """A socket on loopback. handler(connection, body, n) sends what it likes; true: go on with this connection."""

    def __init__(self, handler, context=None, host="127.0.0.1"):
        self.socket, self.handler, self.context = socket.create_server((host, 0), backlog=128), handler, context
        self.port, self.bodies, self.heads = self.socket.getsockname()[1], [], []
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.loop, daemon=True).start()

    def loop(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.one, args=(self.socket.accept()[0],), daemon=True).start()

    def one(self, connection):
        with contextlib.suppress(OSError):
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            while self.one_more(connection):
                pass
        connection.close()

    def one_more(self, connection):
        head = b""
        while b"\r\n\r\n" not in head:
            got = connection.recv(65536)
            if not got:
                return False
            head += got
        head, _, body = head.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
        while len(body) < length:
            body += connection.recv(65536)
        self.heads.append(head)
        self.bodies.append(body)
        return self.handler(connection, body, len(self.bodies))

    def close(self):
        self.socket.close()


@pytest.fixture
def serve():
    servers = []

    def start(handler, **settings):
        servers.append(Server(handler, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def http(body, status="200 OK", *headers):
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]).encode() + b"\r\n\r\n" + body


def words(text, finish="stop"):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}],
                       "usage": {"prompt_tokens": 5, "completion_tokens": 1}}).encode()


def always(raw):
    """A handler that always sends the same bytes."""
    return lambda connection, body, n: connection.sendall(raw) or True


def client(server, **settings):
    vlm = VLM("local/m", url=getattr(server, "url", server), **{"timeout": (5, 20), "deadline": 20, **settings})
    vlm.backoff = 0.01
    return vlm


def pictures(n):
    """n pairs that differ, so that each is asked about."""
    first, second = np.random.default_rng(0).integers(0, 255, (2, n, 16, 16, 3), np.uint8)
    return first, second


# ---- one clock, one size ----
DRIPS = {  # what comes first, and what then comes for ever, a piece every 50 ms
    "status line": (b"", b"H"),
    "header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 Early Hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"),
    "chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
    "trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n"),
}


def drip(first, piece):
    def handler(connection, body, n):
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(0.05)
    return handler


def within(seconds, function):
    """What the function returns; fails if it takes longer, without waiting for it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no end after {seconds} s"
    return results[0]


@pytest.mark.parametrize("where", DRIPS)
def test_a_drip_meets_the_clock_wherever_it_drips(serve, where):
    """timeout[1] is for the whole answer, whichever part of it does not come."""
    server = serve(drip(*DRIPS[where]))
    assert within(6, lambda: client(server, timeout=(2, 0.5), deadline=0).ask(["hi"]).end).startswith(
        "unreachable: no answer from http")


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_a_drip_over_https_meets_the_clock_and_a_good_answer_arrives(serve, tmp_path):
    """The clock must be on encrypted connections too."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2", "-addext", "subjectAltName=DNS:localhost",
                    "-keyout", tmp_path / "k", "-out", tmp_path / "c"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    slow = drip(*DRIPS["header"])
    server = serve(lambda connection, body, n: slow(connection, body, n) if b"drip" in body else
                   connection.sendall(http(words("0"))), context=context)
    vlm = client(server, deadline=0)
    assert "CERTIFICATE_VERIFY_FAILED" in vlm.ask(["hi"]).end
    vlm._session.verify = str(tmp_path / "c")
    vlm.url = vlm.url.replace("127.0.0.1", "localhost")
    vlm.timeout = (5, 5)
    assert vlm.ask(["hi"]).text == "0"
    vlm.timeout = (5, 0.5)
    assert "within 0.5 s" in within(6, lambda: vlm.ask(["drip"]).end)


@pytest.mark.parametrize("head, piece", [
    (b"HTTP/1.1 200 OK\r\n\r\n", b" " * (1 << 16)), (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n" * 1000),
    (b"HTTP/1.1 307 Go\r\nLocation: /x\r\n\r\n", b" " * (1 << 16))])
def test_an_answer_without_end_is_given_up_long_before_the_clock(serve, head, piece):
    """A few megabytes are the most, of body, of trailers, of a redirect's body, of what precedes an answer."""
    def handler(connection, body, n):
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    vlm = client(serve(handler), timeout=(2, 60), deadline=0)
    assert within(20, lambda: vlm.ask(["hi"]).end).endswith("(an answer of more than 4,194,304 bytes), 1 tries; past the deadline")


@pytest.mark.parametrize("layers, status", [(1, "200 OK"), (2, "200 OK"), (1, "307 Go"), (1, "500 No")])
def test_what_unpacks_to_gigabytes_is_not_unpacked(serve, layers, status):
    """The limit is for the unpacked answer too."""
    bomb = b" " * (64 << 20)
    for _ in range(layers):
        bomb = gzip.compress(bomb)
    server = serve(always(http(bomb, status, "Location: /x", "Content-Encoding: " + ", ".join(["gzip"] * layers))))
    vlm, read = client(server, timeout=(2, 60), deadline=0), []
    real = vlm._redacted
    vlm._redacted = lambda raw: read.append(len(raw)) or real(raw)
    assert "more than 4,194,304 bytes" in vlm.ask(["hi"]).end and max(read) < 1000  # the error message


def test_odd_heads_are_failed_tries_and_no_traceback(serve):
    """Too many headers, too long a line, no HTTP, a broken redirect, a broken packing: one line each."""
    for raw in (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000,
                b"SSH-2.0-OpenSSH\r\n", b"", http(b"xx", "200 OK", "Content-Encoding: gzip"),
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):
        reply = client(serve(lambda connection, body, n: connection.sendall(raw)), deadline=0).ask(["hi"])
        assert reply.end.startswith("unreachable: no answer from http"), (raw, reply)
    for location in (b"http://[", b"\xff\xfe", b"//"):
        with pytest.raises(VLMError, match="HTTP 302 .*check the URL"):
            client(serve(always(http(b"{}", "302 Go", "Location: " + location.decode("latin-1")).decode("utf-8").encode(
                "latin-1")))).ask(["hi"])


def test_cookies_do_not_pile_up(serve):
    """What a server wants to be told again is not told."""
    server = serve(lambda connection, body, n: connection.sendall(http(words("0"), "200 OK", f"Set-Cookie: c{n}=x")) or True)
    vlm = client(server)
    for n in range(3):
        vlm.ask([str(n)])
    assert b"ookie" not in b"".join(server.heads) and len(server.heads) == 3


# ---- who is asked ----
@pytest.mark.parametrize("host, own", [
    ("localhost", 1), ("LOCALHOST", 1), ("vlm.localhost", 1), ("localhost.", 1), ("127.0.0.1", 1), ("127.9.9.9", 1),
    ("127.1", 1), ("0.0.0.0", 1), ("0", 1), ("[::1]", 1), ("[::]", 1), ("[::ffff:127.0.0.1]", 1), ("[0:0:0:0:0:0:0:1]", 1),
    ("2130706433", 1), ("localhost4.localdomain4", 1), ("localhost6.localdomain6", 1), ("127.0.0.1.", 1), ("[::1%25lo]", 1),
    ("localhost4.example.org", 0), ("localhost.example.org", 0), ("notlocalhost", 0), ("128.0.0.1", 0), ("10.0.0.1", 0), ("[::2]", 0),
    ("example.org", 0), ("127.0.0.1.example.org", 0)])
def test_loopback_is_known_by_all_its_names(host, own):
    """A proxy of the environment is for other hosts only."""
    assert VLM("local/m", url=f"http://{host}:8000/v1")._session.trust_env is not bool(own)


@pytest.mark.parametrize("name", ["0.0.0.0", "127.0.0.2"])
def test_no_proxy_is_asked_for_this_machine(serve, monkeypatch, name):
    """vLLM prints http://0.0.0.0:8000 as its address."""
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    server = serve(always(http(words("0"))), host="0.0.0.0")
    assert client(f"http://{name}:{server.port}/v1").ask(["hi"]).text == "0"


@pytest.mark.parametrize("raw", [
    http(words("0"), "201 Created"), http(b"\xef\xbb\xbf" + words("0")),
    b"HTTP/1.1 102 Processing\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2 + http(words("0"))])
def test_a_good_answer_in_an_odd_wrapping_is_taken(serve, tmp_path, raw):
    """It was paid for."""
    server = serve(always(raw))
    for cached in (False, True):
        reply = client(server, cache=tmp_path).ask(["hi"])
        assert (reply.text, reply.end, reply.cached) == ("0", "complete", cached) and len(server.bodies) == 1


@pytest.mark.parametrize("status", ["405 Method Not Allowed", "501 Unsupported method ('POST')"])
def test_a_server_that_takes_no_questions_is_the_wrong_url(serve, status):
    """It will not take them later either."""
    with pytest.raises(VLMError, match="check the URL"):
        client(serve(always(http(b"<html><title>x</title>", status)))).ask(["hi"])


@pytest.mark.parametrize("body, says", [({"error": 7}, "7"), ({"error": ["a", {"b": 1}]}, "a"), ({"error": {"message": ["x"]}}, "x"),
                                        ({"error": {"message": {"x": "y" * 9999}, "code": {}}}, "y"), ({"detail": 5}, "5"), ([3], "3")])
def test_errors_that_are_no_strings_are_one_short_line(serve, body, says):
    """Whatever type stands where the message should."""
    with pytest.raises(VLMError, match=says) as caught:
        client(serve(always(http(json.dumps(body).encode(), "400 No")))).ask(["hi"])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_page_of_titles_without_end_is_read_at_once():
    """The search for a title must not take the square of the length."""
    began = time.monotonic()
    vlm_query.error_in("<title>" * 500_000)
    assert time.monotonic() - began < 5


def test_absurd_hints_to_wait_end_at_once(serve):
    """Beyond the deadline there is nothing to wait for, however far."""
    for wish in ("86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 -9999"):
        server = serve(always(http(b"{}", "429 No", f"Retry-After: {wish}")))
        assert "past the deadline" in within(5, lambda: client(server, deadline=0.5).ask(["hi"]).end)


# ---- the first failed try ----
@pytest.mark.parametrize("raw, says", [
    (None, "Connection refused"), (http(b'{"error": "Unexpected endpoint or method. (POST /v1)"}'), "Unexpected endpoint"),
    (http(b"Ollama is running"), "Ollama is running"), (b"SSH-2.0\r\n", "SSH-2.0")])
def test_a_server_that_is_none_is_named_at_the_first_try_and_given_up_soon(serve, capfd, raw, says):
    """The deadline is for servers that are busy."""
    server = serve(lambda connection, body, n: connection.sendall(raw)) if raw else None
    vlm = client(server or "http://127.0.0.1:9/v1", deadline=60)
    vlm.soon = 0.3
    with pytest.raises(VLMError, match=f"sight check: unreachable.*{says}"):
        within(20, lambda: pytest.raises(VLMError, vlm.check_sight)) and vlm.check_sight()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("waiting for the server: ") and says in err


def test_a_name_that_is_none_is_named(monkeypatch, capfd):
    """Not only "ConnectionError"."""
    def lookup(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    client("http://127.0.0.1:1/v1", deadline=0).ask(["hi"])
    assert "Name or service not known" in capfd.readouterr().err


def test_once_a_server_has_answered_an_outage_has_until_the_deadline(serve):
    """Restarting it must not end a run."""
    def handler(connection, body, n):
        return connection.sendall(http(words("0"))) if n == 1 or n > 8 else None  # else hangs up

    vlm = client(serve(handler), deadline=60)
    vlm.soon, vlm.backoff = 0.0, 0.01
    assert vlm.ask(["a"]).text == "0" and vlm.ask(["b"]).text == "0"


def test_whoever_watches_hears_when_waiting_begins_and_ends(serve):
    """The progress bar shows it."""
    said = []
    vlm = client(serve(lambda connection, body, n: connection.sendall(http(words("0")) if n > 2 else http(b"", "503 No"))), deadline=60)
    vlm.waits = said.append
    assert vlm.ask(["hi"]).text == "0" and said == [True, False]


# ---- a server that dies, a server that is slow ----
@pytest.mark.parametrize("how", ["hangs", "503", "refuses"])
def test_a_dead_server_is_given_up_after_one_deadline_not_once_a_question(serve, how):
    """23 questions must not wait 23 times."""
    gone = threading.Event()

    def handler(connection, body, n):
        if n > 3 and how == "hangs":
            gone.wait(20)
        return n <= 3 and (connection.sendall(http(words("0"))) or True) or connection.sendall(http(b"", "503 No"))

    server = serve(handler)
    vlm = client(server, timeout=(2, 0.3), deadline=0.8)
    if how == "refuses":
        vlm.ask(["before"])
        vlm.url = "http://127.0.0.1:9/v1"
    kept = []

    def ask():
        with pytest.raises(VLMError, match="gives no answer: ") as caught:
            label_pairs(vlm, *pictures(23), "g", stages=1, workers=2, log=kept.append)
        return caught

    began = time.monotonic()
    within(10, ask)
    assert time.monotonic() - began < 5 and len(kept) <= 5  # 10 s and more, if each pair of questions waited
    gone.set()


def test_one_question_that_is_never_answered_does_not_end_the_batch(serve):
    """The server is alive: the others were answered meanwhile."""
    bad = []

    def handler(connection, body, n):
        bad.append(body) if not bad else None
        time.sleep(0.02)
        return connection.sendall(http(b"", "500 No") if body == bad[0] else http(words("0"))) or True

    labels, counts = label_pairs(client(serve(handler), deadline=0.4), *pictures(60), "g", stages=1, workers=2)
    assert counts["no_answer"] == 1 and counts["label0"] == 59


def one_at_a_time(seconds):
    """A server that answers one at a time, also what nobody waits for any more -> handler, list of all it computed."""
    lock, done = threading.Lock(), []

    def handler(connection, body, n):
        with lock:
            time.sleep(seconds)
            done.append(body)
        connection.sendall(http(words("0")))
        return True

    return handler, done


def test_eight_workers_before_a_server_that_answers_one_at_a_time_compute_little_in_vain(serve):
    """Behind seven others an answer would come too late; so there must be fewer."""
    handler, done = one_at_a_time(0.1)
    vlm = client(serve(handler), timeout=(2, 0.5), deadline=1.0)
    labels, counts = label_pairs(vlm, *pictures(20), "g", stages=1, workers=8)
    assert counts["label0"] == 20 and len(done) <= 24, (counts, len(done))


def test_turns_grow_while_answers_are_quick_and_halve_when_one_is_late():
    """The rule, without a clock."""
    turns, never = vlm_query.Turns(3), threading.Event()
    for quick, late, limit in ((0, 0, 1), (1, 0, 2), (1, 0, 3), (1, 0, 3), (0, 1, 1), (0, 1, 1), (1, 0, 2)):
        turns.give_back(turns.take(never), quick, late)
        assert turns.limit == limit
    both = [turns.take(never), turns.take(never)]
    turns.give_back(both[0], True, False)
    turns.give_back(both[1], False, True)
    assert both == [2, 2] and turns.limit == 3  # one change in a round
    for _ in range(3):
        turns.take(never)
    never.set()
    with pytest.raises(TimeoutError, match="stopped"):
        turns.take(never)


def test_the_queue_does_not_count_against_a_questions_deadline(serve):
    """Ten answers of 0.15 s, one at a time, are longer than a deadline of 0.5 s, and all arrive."""
    handler, _ = one_at_a_time(0.15)
    vlm = client(serve(handler), timeout=(2, 0.29), deadline=0.5)
    assert label_pairs(vlm, *pictures(10), "g", stages=1, workers=8)[1]["label0"] == 10


def test_an_answer_slower_than_the_deadline_can_arrive_and_the_flag_says_how_slow(serve):
    """--timeout, also on resume."""
    server = serve(lambda connection, body, n: time.sleep(0.5) or connection.sendall(http(words("0"))))
    assert client(server, timeout=(2, 5), deadline=0.1).ask(["hi"]).text == "0"
    assert settings.resolve(settings.Config(timeout=600.0)).timeout == 600 and "timeout" in settings.MAY_CHANGE
    for wrong in (0.0, -1.0, 1e9, float("nan"), float("inf")):
        with pytest.raises(settings.UserError, match="--timeout"):
            settings.resolve(settings.Config(timeout=wrong))


def test_workers_are_bounded_everywhere():
    """A queue of two thousand million places must not be made."""
    with pytest.raises(settings.UserError, match="--workers 257: it must be at least 1, at most 256"):
        settings.resolve(settings.Config(workers=257))
    with pytest.raises(VLMError, match="workers must be 1 to 256"):
        VLM("local/m", url="http://h/v1", workers=2**31)
    with pytest.raises(ValueError, match="at most 256"):
        label_pairs(lambda parts: None, *pictures(1), "g", workers=2**31)


# ---- the cache ----
def test_two_processes_beside_one_cache_pay_once(serve, tmp_path):
    """Also for what both want at the same moment."""
    server = serve(lambda connection, body, n: time.sleep(0.1) or connection.sendall(http(words("0"))) or True)
    code = (f"import sys; sys.path.insert(0, {str(Path(vlm_query.__file__).parent)!r})\nimport numpy as np, vlm_query\n"
            "first, second = np.random.default_rng(0).integers(0, 255, (2, 6, 16, 16, 3), np.uint8)\n"
            f"vlm = vlm_query.VLM('local/m', url={server.url!r}, cache={str(tmp_path / 'c')!r})\n"
            "print(flush=True)\nsys.stdin.read(1)\nprint(vlm_query.label_pairs(vlm, first, second, 'g', stages=1)[1]['label0'])\n")
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    for process in both:
        process.stdout.readline()  # ready
    for process in both:
        process.stdin.write("x")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in both] == ["6\n"] * 2
    assert len(server.bodies) == 6
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".json"] * 6  # and no lock is left


def test_two_clients_of_one_process_pay_once_and_a_lock_that_was_left_holds_nobody(serve, tmp_path):
    """A killed process leaves its lock file, not its lock."""
    server = serve(lambda connection, body, n: time.sleep(0.1) or connection.sendall(http(words("0"))) or True)
    vlms = [client(server, cache=tmp_path, timeout=(2, 20)) for _ in range(2)]
    vlms[0]._question(["hi"])[1].with_suffix(".lock").touch()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda vlm: within(20, lambda: vlm.ask(["hi"])), vlms))
    assert len(server.bodies) == 1 and sorted(reply.cached for reply in replies) == [False, True]


@pytest.mark.parametrize("how", ["a file", "below a file", "a dangling link", "read only"])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path, how):
    """An answer that cannot be kept must not be paid for."""
    place = tmp_path / "c"
    if how == "a dangling link":
        place.symlink_to(tmp_path / "nowhere" / "c")
    elif how == "read only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        place.mkdir(mode=0o500)
    else:
        place.touch()
    with pytest.raises(VLMError, match="answers cannot be kept in "):
        VLM("local/m", url="http://127.0.0.1:9/v1", cache=place / "d" if how == "below a file" else place)


def test_trying_the_folder_leaves_nothing_behind_and_losing_it_later_is_one_line(serve, tmp_path, monkeypatch):
    """A run that does not begin leaves no folder; a disk that fills up is no traceback."""
    vlm = client(serve(always(http(words("0")))), cache=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(VLMError, match="cannot be kept.*No space left"):
        vlm.ask(["hi"])
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("kept", [b"{}", b'{"choices": []}', b'{"choices": "none"}', b'{"error": {"message": "x"}}', b'{"error": "x"}',
                                  words("", "stop"), words("0", "error"), b'{"status": "ok"}', b"null", b"\xff{}"])
def test_a_kept_file_that_no_client_would_keep_is_asked_again(serve, tmp_path, kept):
    """Whoever wrote it: it must not be the answer for ever."""
    server = serve(always(http(words("0"))))
    vlm = client(server, cache=tmp_path)
    vlm._question(["hi"])[1].write_bytes(kept)
    assert vlm.ask(["hi"])[::4] == ("0", False) and vlm.ask(["hi"])[::4] == ("0", True) and len(server.bodies) == 1


def test_a_filtered_answer_and_a_refusal_are_still_kept(serve, tmp_path):
    """They were paid for."""
    filtered = b'{"error": {"code": "content_filter", "message": "no"}}'
    server = serve(lambda connection, body, n: connection.sendall(
        http(filtered, "400 No") if b"bad" in body else http(words("no", "content_filter"))) or True)
    vlm = client(server, cache=tmp_path)
    assert [vlm.ask([text])[1::3] for text in ("bad", "bad", "x", "x")] == [("refused", False), ("refused", True)] * 2


def test_forget_makes_the_next_ask_ask_anew(serve, tmp_path):
    """Whoever cannot use an answer may ask for another one."""
    server = serve(lambda connection, body, n: connection.sendall(http(words(str(n)))) or True)
    vlm = client(server, cache=tmp_path)
    texts = [vlm.ask(["hi"]).text, vlm.ask(["hi"]).text]
    vlm.forget(["hi"])
    vlm.forget(["never asked"])
    client(server).forget(["no cache"])
    assert texts + [vlm.ask(["hi"]).text, vlm.ask(["hi"]).text] == ["1", "1", "2", "2"]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("useless", [words("I cannot say."), words("0", "length"), words("no", "content_filter")])
def test_useless_answers_that_stop_a_run_are_asked_again_by_the_run_that_goes_on(serve, tmp_path, useless, stages):
    """And only these: the usable ones come from the cache."""
    cured = []

    def handler(connection, body, n):
        second = b"The notes:" in body or stages == 1
        done.add(body) if second else None
        good = cured or not second or len(done) <= 2
        return connection.sendall(http(words(str(n) if not second else "0") if good else useless)) or True

    done = set()
    server = serve(handler)
    ask = lambda: label_pairs(client(server, cache=tmp_path, workers=1), *pictures(6), "g", stages, workers=1)
    with pytest.raises(VLMError, match="got no usable answer"):
        ask()
    before = len(server.bodies)
    cured.append(True)
    assert ask()[1]["label0"] == 6 and (before, len(server.bodies)) == (6 * stages, 6 * stages + 4)


def test_useless_answers_that_stop_nothing_are_kept(serve, tmp_path):
    """A resumed run must meet what the first one met."""
    server = serve(lambda connection, body, n: connection.sendall(http(words("0" if n > 2 else "?"))) or True)
    counts = [label_pairs(client(server, cache=tmp_path), *pictures(6), "g", 1, workers=1)[1] for _ in range(2)]
    assert counts[0]["unreadable"] == counts[1]["unreadable"] == 2 and len(server.bodies) == 6


# ---- keys and escape codes ----
ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)


@pytest.mark.parametrize("quoted", [
    KEY, KEY.replace("/", "\\/"), ESCAPED, KEY.replace("/", "%2F").replace("+", "%2B"), KEY.upper(),
    *(base64.b64encode(b"x" * n + KEY.encode()).decode() for n in range(3)),
    base64.b64encode(f"user:{KEY}".encode()).decode(), base64.urlsafe_b64encode(KEY.encode()).decode()])
def test_the_key_is_redacted_before_anything_is_kept_or_shown(serve, tmp_path, quoted, capfd):
    """In answers, in fields that nobody reads, in errors; in whatever way JSON, a URL or base64 writes it."""
    raw = words("It said QUOTED.\n0").replace(b"}]", b'}], "debug": "Bearer QUOTED"', 1).replace(b"QUOTED", quoted.encode())
    error = b'{"error": {"message": "QUOTED is wrong"}}'.replace(b"QUOTED", quoted.encode())
    server = serve(lambda connection, body, n: connection.sendall(
        http(error, "401 No") if b"bad" in body else http(error, "503 No") if n == 1 else http(raw)) or True)
    vlm = client(server, key=KEY, cache=tmp_path, deadline=60)
    reply = vlm.ask(["hi"])
    with pytest.raises(VLMError) as caught:
        vlm.ask(["bad"])
    kept, = (path.read_text() for path in tmp_path.iterdir())
    core = quoted[8:-4] if quoted.isalnum() or quoted.endswith("=") else quoted
    for text in (reply.text, kept, str(caught.value), capfd.readouterr().err):
        assert "[key]" in text and core not in text and KEY not in text and json.loads(json.dumps(text))
    assert KEY not in json.dumps(json.loads(kept)) and vlm_query.parse_label(reply.text) == 0


def test_what_was_kept_with_a_key_in_it_is_read_without_it(serve, tmp_path):
    """By an older version, say."""
    vlm = client("http://127.0.0.1:9/v1", key=KEY, cache=tmp_path)
    vlm._question(["hi"])[1].write_bytes(words(f"{KEY}\n0"))
    assert vlm.ask(["hi"]).text == "[key]\n0"


def test_a_short_key_is_no_secret_and_changes_no_answer(serve):
    """LOCAL_API_KEY=none would blot out a word."""
    assert client(serve(always(http(words("none of them\n0")))), key="none").ask(["hi"]).text == "none of them\n0"


NASTY = "\x1b[2J\x1b]0;owned\x07\x9b31m\x08\r\x00\u202egnp.exe\u2066\ud800\x7f"


def test_printable_keeps_words_and_lines_and_nothing_that_steers():
    """Escape codes (also of one byte, C1), overrides of direction, half characters; not what letters need."""
    clean = printable("a\tb\r\nc\n" + NASTY + "\u00e9 \u4e2d \U0001f469\u200d\U0001f680")
    assert clean.startswith("a\tb\nc\n?[2J?]0;owned??31m????gnp.exe???") and clean.endswith("\u00e9 \u4e2d \U0001f469\u200d\U0001f680")
    assert printable(ValueError("x\x1b")) == "x?" and clean.encode() and str(VLMError("a\nb\x1b")) == "a b?"


def test_no_escape_code_of_a_server_reaches_the_terminal(serve, tmp_path, capfd):
    """Neither in an error, nor in an answer that the command line prints, nor in the first failed try."""
    for name, level in (("a", 20), ("b", 220)):
        vlm_query.iio.imwrite(tmp_path / f"{name}.png", np.full((32, 32, 3), level, np.uint8))
    flags = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--goal", "g", "--vlm", "local/m", "--vlm-url"]
    error = json.dumps({"error": {"message": NASTY + " bad"}}).encode()
    server = serve(lambda connection, body, n: connection.sendall(http(error, "503 No") if n == 1 else http(words(NASTY + "\n0"))) or True)
    assert vlm_query.main([*flags, server.url]) == 0
    assert vlm_query.main([*flags, serve(always(http(error, "401 No"))).url]) == 2
    out, err = capfd.readouterr()
    assert "owned" in out and err.count("owned") == 2 and err.count("\n") == 2
    assert not set("\x1b\x07\x08\x9b\u202e\ud800\r\x00") & set(out + err)


# ---- temperature 0, and the probabilities of tokens ----
ASKS = ["Image 1:", np.zeros((16, 16, 3), np.uint8), vlm_query.ANSWER]  # any question that ends with ANSWER
ODDS = {"1": .63, " 1": .07, "0": .3}  # P[second] = .7


def told(text, tokens=None, finish="stop"):
    """OpenAI's answer with probabilities. tokens: [(token, {what may have stood there: probability})]."""
    content = [{"token": token, "logprob": float(np.log(top[token])), "bytes": None,
                "top_logprobs": [{"token": each, "logprob": float(np.log(p))} for each, p in top.items()]}
               for token, top in tokens or [(text, {text: .99, "x": .01})]]
    choice = {"message": {"content": text}, "finish_reason": finish, "logprobs": {"content": content}}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}).encode()


def in_order(*replies):
    """A handler that sends these, one a request, and the last one for ever."""
    return lambda connection, body, n: connection.sendall(replies[min(n, len(replies)) - 1]) or True


def fields(server):
    """What each body asks for beside the question."""
    return [{name: value for name, value in json.loads(body).items() if name not in ("model", "messages")}
            for body in server.bodies]


REFUSES = {  # in the words of servers that do
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    "logprobs": "Gaudi doesn't support logprobs. Please remove 'logprobs'/'top_logprobs' from your request to receive a response."}


@pytest.mark.parametrize("status", ["400 No", "422 No", "403 No"])
def test_a_server_that_refuses_temperature_0_is_asked_without_it_and_the_user_hears_once(serve, tmp_path, capfd, status):
    """And the answer is kept as one to the question without it, so that nobody takes it for a greedy one."""
    def handler(connection, body, n):
        refused = b'"temperature"' in body
        error = json.dumps({"error": {"message": REFUSES["temperature"]}}).encode()
        return connection.sendall(http(error, status) if refused else http(words("0"))) or True

    server = serve(handler)
    vlm = client(server, cache=tmp_path)
    assert label_pairs(vlm, *pictures(6), "g", stages=1)[1]["label0"] == 6
    assert fields(server)[0] == {"temperature": 0} and fields(server)[-1] == {} and len(server.bodies) >= 7
    assert capfd.readouterr().err == "local/m refuses temperature 0: it is left out, and the same question may get another answer\n"
    greedy, without = client(server, cache=tmp_path), client(server, cache=tmp_path, extra={"temperature": None})
    assert not greedy._question(ASKS)[1] == without._question(ASKS)[1] == vlm._question(ASKS)[1]
    before = len(server.bodies)
    assert label_pairs(without, *pictures(6), "g", stages=1)[1]["cached"] == 6 and len(server.bodies) == before


def test_threads_that_were_refused_together_all_go_on(serve):
    """Two bodies with the temperature may be under way when the first refusal arrives."""
    both = threading.Barrier(4)

    def handler(connection, body, n):
        if b'"temperature"' not in body:
            return connection.sendall(http(words("0"))) or True
        both.wait(20)
        return connection.sendall(http(json.dumps({"error": {"message": REFUSES["temperature"]}}).encode(), "400 No")) or True

    vlm = client(serve(handler))
    vlm._turns.limit = 4
    assert label_pairs(vlm, *pictures(4), "g", stages=1, workers=4)[1]["label0"] == 4


def test_a_temperature_that_the_user_names_is_the_users(serve):
    """It is sent as it is; and a server that refuses it stops the run, in its own words."""
    server = serve(always(http(json.dumps({"error": {"message": REFUSES["temperature"]}}).encode(), "400 No")))
    with pytest.raises(VLMError, match="Only the default .* value is supported.*change what it refuses"):
        client(server, extra={"temperature": 0.7}).ask(ASKS)
    assert fields(server) == [{"temperature": 0.7}]
    server = serve(always(http(words("0"))))
    client(server, extra={"temperature": None, "seed": 1}).ask(ASKS)
    client(server, extra={"temperature": 0.7, "top_logprobs": 20}, logprobs=True).ask(ASKS)
    assert fields(server) == [{"seed": 1}, {"logprobs": True, "top_logprobs": 20, "temperature": 0.7}]


def test_an_error_that_names_something_else_still_stops(serve):
    """The goal's own words must not read as a refusal of what was not asked for, nor be asked for ever."""
    server = serve(always(http(b'{"error": {"message": "no images here, at any temperature, with logprobs or without"}}', "400 No")))
    with pytest.raises(VLMError, match="no images here"):
        client(server, logprobs=True).ask(ASKS)
    assert fields(server) == [{"temperature": 0, "logprobs": True, "top_logprobs": 5}, {"logprobs": True, "top_logprobs": 5}, {}]


@pytest.mark.parametrize("provider, url, where", [
    ("openai/m", "", lambda body: body), ("gemini/m", "beta", lambda body: body.get("generationConfig", {})),
    ("local/m", "", lambda body: body)])
def test_probabilities_are_asked_for_where_a_label_is_and_nowhere_else(serve, provider, url, where):
    """Off by default; with two stages only in call 2, so that call 1, with its images, is the same question as before."""
    raw = {"candidates": [{"content": {"parts": [{"text": "1"}]}, "finishReason": "STOP"}], **json.loads(words("1"))}
    server = serve(always(http(json.dumps(raw).encode())))
    asked = []
    for settings in ({}, {"logprobs": True}):
        for stages in (1, 2):
            vlm = VLM(provider, url=server.url, key="k", **settings)
            label_pairs(vlm, *pictures(1), "g", stages)
    asked = ["logprobs" in where(json.loads(body)) for body in server.bodies]
    assert asked == [False, False, False, True, False, True]
    assert server.bodies[1] == server.bodies[4]  # byte for byte: call 1 without and with


@pytest.mark.parametrize("text, tokens, p", [
    ("1", [("1", ODDS)], .7), (" 1", [(" 1", ODDS)], .7), ("1", [("\n1", {"\n1": .4, "\n0": .6})], .4),
    ("**1**", [("**", {"**": 1}), ("1", ODDS), ("**", {"**": 1})], .7), ("0", [("0", ODDS), ("<|im_end|>", {"<|im_end|>": 1})], .7),
    ("1", [("\u01201", {"\u01201": .9, "\u01200": .1})], .9), ("1", [("\u25811", {"\u25811": .9, "1": .05, "0": .05})], .95),
    ("100% sure: 1", [("1", {"1": 1}), ("0", {"0": 1}), ("0", {"0": 1}), ("% sure:", {"% sure:": 1}), (" 1", ODDS)], .7),
    ("0 (Image 1)", [("0", ODDS), (" (Image ", {" (Image ": 1}), ("1", {"1": .9, "2": .1}), (")", {")": 1})], .7),
    ("1, Image 2 is closer than Image 1", [("1", ODDS), (", Image 2 is closer than Image ", {", Image 2 is closer than Image ": 1}),
                                           ("1", {"1": .9, "0": .1})], .7),
    ("\u2705 Done.\n1", [("\ufffd", {"\ufffd": 1}), ("\ufffd", {"\ufffd": 1}), (" Done.\n", {" Done.\n": 1}), ("1", ODDS)], .7),
    ("1", [("<think>Is it 1?</think>\n\n", {"<think>Is it 1?</think>\n\n": 1}), ("1", ODDS), ("</s>", {"</s>": 1})], .7),
    ("1", [("1", {"1": .6, "0": .2, "-": .1, "10": .05, "-0": .05})], .75),
    ("1", [("1", {"1": .3, "0": .6})], .3333), ("1", [("1", {"1": .9, "The": .1})], 1.0),
    ("-1", [("-", {"-": 1}), ("1", ODDS)], None), ("\u22121", [("\u22121", {"\u22121": .9, "1": .1})], None),
    ("1", [("1", {"1": .9})], None), ("0.5", [("0", ODDS), (".", {".": 1}), ("5", {"5": 1})], None),
    ("\uff11", [("\ufffd", ODDS | {"\ufffd": 1}), ("\ufffd", {"\ufffd": 1})], None), ("1", [("2", ODDS | {"2": 1})], None),
    ("Step 1 is done.\n\uff11", [("Step ", {"Step ": 1}), ("1", ODDS), (" is done.\n", {" is done.\n": 1}), ("\ufffd", {"\ufffd": 1})], None)])
def test_the_label_is_found_among_the_tokens_or_not_at_all(serve, text, tokens, p):
    """Spaces, marks, thoughts and images' numbers around it; a label in pieces, an unsure one, one that stands alone."""
    vlm = client(serve(always(http(told(text, tokens)))), logprobs=True)
    assert vlm.ask(ASKS)[::5] == (text, p)


def test_a_token_that_was_drawn_though_it_is_not_among_the_likeliest_counts_too(serve):
    """A server that samples may write the sixth likeliest token, and lists five."""
    top = [{"token": each, "logprob": float(np.log(p))} for each, p in {"0": .6, "The": .2}.items()]
    raw = json.loads(told("1"))
    raw["choices"][0]["logprobs"]["content"] = [{"token": "1", "logprob": float(np.log(.15)), "top_logprobs": top}]
    vlm = client(serve(always(http(json.dumps(raw).encode()))), logprobs=True)
    assert vlm.ask(ASKS)[::5] == ("1", .2)


@pytest.mark.parametrize("odd", [
    None, {}, {"content": None}, {"content": []}, {"content": ["1"]}, {"content": [{"token": "1", "logprob": -.1}]}, [], "no", 7,
    {"content": [{"token": "1", "logprob": -.1, "top_logprobs": None}]}, {"content": [{"token": 1, "logprob": -.1, "top_logprobs": []}]},
    {"content": [{"token": "1", "logprob": "x", "top_logprobs": [{"token": "0", "logprob": -1}]}]},
    {"content": [{"token": "1", "logprob": float("nan"), "top_logprobs": [{"token": "0", "logprob": -1}]}]},
    {"content": [{"token": "1", "logprob": 9e9, "top_logprobs": [{"token": "0", "logprob": -1}]}]},
    {"content": [{"token": ["1"], "logprob": -.1, "top_logprobs": [{"token": "0", "logprob": -1}]}]},
    {"tokens": ["1"], "token_logprobs": [-.1], "top_logprobs": [{"1": -.1}]}])
def test_probabilities_that_do_not_come_are_missed_once_in_words_and_the_label_stays(serve, capfd, odd):
    """A server that ignores the wish, or has a format of its own, costs no label; and the wish stays in each body."""
    raw = json.loads(words("1"))
    raw["choices"][0]["logprobs"] = odd
    server = serve(always(http(json.dumps(raw).encode())))
    records = []
    labels, _ = label_pairs(client(server, logprobs=True), *pictures(3), "g", stages=1, log=records.append)
    assert labels.tolist() == [1, 1, 1] and not any("p_second" in record for record in records)
    assert capfd.readouterr().err == ("local/m gave an answer without the probabilities of tokens (logprobs): "
                                      "labels without them are 0 or 1\n")
    assert all(asked["logprobs"] for asked in fields(server))


@pytest.mark.parametrize("raw", [words("-1"), words("I cannot say."), words("1", "length"), told("-1"), words("1", "content_filter")])
def test_nothing_is_missed_where_there_is_no_label(serve, capfd, raw):
    """An unsure or useless first answer says nothing about what the server can tell."""
    assert client(serve(always(http(raw))), logprobs=True).ask(ASKS).p_second is None and not capfd.readouterr().err


@pytest.mark.parametrize("provider, message", [
    ("local/m", REFUSES["logprobs"]), ("gemini/m", "Logprobs is not enabled for models/gemini-2.5-pro"),
    ("openai/m", "You are not allowed to request logprobs from this model")])
def test_a_server_that_refuses_to_tell_is_asked_without_and_the_user_hears_once(serve, capfd, provider, message):
    """The labels are then those of a run without soft labels, and so are the questions."""
    answer = {"candidates": [{"content": {"parts": [{"text": "1"}]}, "finishReason": "STOP"}], **json.loads(words("1"))}
    error = http(json.dumps({"error": {"message": message, "code": 400}}).encode(), "400 No")
    server = serve(lambda connection, body, n: connection.sendall(error if b"ogprobs" in body else http(json.dumps(answer).encode())) or True)
    vlm, records = VLM(provider, url=server.url, key="k", logprobs=True), []
    labels, _ = label_pairs(vlm, *pictures(3), "g", stages=1, log=records.append)
    assert labels.tolist() == [1, 1, 1] and not any("p_second" in record for record in records)
    assert capfd.readouterr().err == f"{provider} refuses the probabilities of tokens (logprobs): labels without them are 0 or 1\n"
    plain = serve(always(http(json.dumps(answer).encode())))
    label_pairs(VLM(provider, url=plain.url, key="k"), *pictures(3), "g", stages=1)
    assert sorted(body for body in server.bodies if b'"logprobs"' not in body) == sorted(plain.bodies)


def test_anthropic_has_none_and_says_so_before_anything_is_asked(serve, capfd):
    """One line, and the run goes on."""
    raw = {"content": [{"type": "text", "text": "1"}], "stop_reason": "end_turn", "usage": {}}
    server = serve(always(http(json.dumps(raw).encode())))
    vlm = VLM("anthropic/m", url=server.url, key="k", logprobs=True)
    assert capfd.readouterr().err == ("anthropic/m does not tell the probabilities of tokens (logprobs): "
                                      "labels without them are 0 or 1\n")
    assert vlm.ask(ASKS)[::5] == ("1", None) and fields(server) == [{"max_tokens": 8192}] and not capfd.readouterr().err


def test_geminis_probabilities_are_read_also_where_a_zero_is_left_out(serve):
    """logProbability 0 is a certain token, and Google's JSON may leave a 0 out."""
    def answer(*top):
        found = {"chosenCandidates": [top[0], {"token": "\n"}], "topCandidates": [{"candidates": list(top)}, {"candidates": [{"token": "\n"}]}]}
        candidate = {"content": {"parts": [{"text": "1\n"}]}, "finishReason": "STOP", "logprobsResult": found}
        return http(json.dumps({"candidates": [candidate]}).encode())

    server = serve(in_order(
        answer({"token": "1", "logProbability": float(np.log(.6))}, {"token": "0", "logProbability": float(np.log(.2))}),
        answer({"token": "1"}, {"token": "0", "logProbability": -50})))
    vlm = VLM("gemini/m", url=server.url, key="k", logprobs=True)
    assert [vlm.ask(ASKS).p_second for _ in range(2)] == [.75, 1.0]
    assert json.loads(server.bodies[0])["generationConfig"] == {"responseLogprobs": True, "logprobs": 5}


@pytest.mark.parametrize("stages", [1, 2])
def test_probabilities_are_in_the_log_and_in_the_cache(serve, tmp_path, stages):
    """A resumed run reads the same ones without asking; and turning them on asks only for what was not there."""
    def handler(connection, body, n):
        label = b"Finish with one last line" in body
        return connection.sendall(http(told("1", [("1", ODDS)]) if label else words("They differ."))) or True

    server = serve(handler)
    runs = []
    for logprobs in (False, True, True, False):
        records, before = [], len(server.bodies)
        labels, counts = label_pairs(client(server, cache=tmp_path, logprobs=logprobs), *pictures(2), "g", stages, log=records.append)
        runs.append(([record.get("p_second", "-") for record in records], counts["cached"], len(server.bodies) - before))
        assert labels.tolist() == [1, 1]
    # With two stages both pairs share call 2, because their notes are the same.
    first = (3, 1) if stages == 2 else (2, 2)
    assert runs == [(["-", "-"], runs[0][1], first[0]), ([.7, .7], runs[1][1], first[1]), ([.7, .7], 2, 0), (["-", "-"], 2, 0)]
    assert json.loads(json.dumps(records)) == records


def test_a_kept_answer_that_is_not_whole_does_not_end_a_run_with_soft_labels(serve, tmp_path):
    """Somebody may have cut the probabilities out of the file: then the label is 0 or 1."""
    vlm = client("http://127.0.0.1:9/v1", cache=tmp_path, logprobs=True)
    vlm._question(ASKS)[1].write_bytes(words("1"))
    assert vlm.ask(ASKS) == ("1", "complete", 5, 1, True, None)


@pytest.mark.parametrize("provider, name", [("openai/m", "4c07e99b"), ("gemini/m", "5c4c5fbd"), ("anthropic/m", "331fcf96"), ("offline/m", "33194bad")])
def test_old_answers_of_hosted_models_are_still_found(tmp_path, provider, name):
    """The names of their files were written down when there was neither temperature nor logprobs."""
    vlm = VLM(provider, url="http://h/v1", key="k", cache=tmp_path, extra={"a": {"b": 1}})
    assert vlm._question([vlm_query.ANSWER])[1].name.startswith(name)
