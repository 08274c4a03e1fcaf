"""The stand-in for a VLM: what it reads from pixels, how it answers, and how it refuses."""
import inspect
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import requests

import code_as_reward
import envs
from support import offline_vlm
import vlm_query
from support.offline_vlm import OfflineVLM
from test_components import gray, quick
from vlm_query import VLM, VLMError, label_pairs


def test_stand_ins_that_differ_share_no_answers(tmp_path):
    """One that errs and one that does not must not answer for each other from one cache, under whatever name."""
    first, second, right = draw_poles(1, size=64)
    for mistakes, expected in ((1.0, 1 - right), (0.0, right)):
        with OfflineVLM(mistakes=mistakes) as url:
            assert label_pairs(quick(url, "offline", cache=tmp_path), first, second, POLE)[0].tolist() == expected.tolist()
    assert OfflineVLM(faults="refusal").model != OfflineVLM().model == OfflineVLM(faults=0.2).model


@pytest.mark.parametrize("name, read, width, place", [  # width: of the object, cm; place: x, y, z of its middle, m
    ("Soccer", offline_vlm.read_ball, 5.2, (0.02, 0.7, 0.026)),  # on the table
    ("Soccer", offline_vlm.read_ball, 5.2, (0.02, 0.7, 0.07)),
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.12, 0.7, 0.07)),  # on the table
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.05, 0.7, 0.17)),
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.12, 0.7, 0.12)),
])
def test_what_is_in_the_air_is_read_where_it_is(env_of, name, read, width, place):
    """Taken for one on the table, a ball 4 cm up would seem centimetres nearer to the goal, a cube 10 cm up elsewhere."""
    env = env_of(name)
    env.reset(seed=0)
    sim = env.unwrapped.sim
    state = sim.data.qpos.copy()
    state[9:12] = place
    sim.set_state(state, np.zeros_like(sim.data.qvel))
    distance = 100 * np.linalg.norm(np.array(place[:2]) - sim._target_pos[:2])  # cm
    assert read(env.image(300)) * width == pytest.approx(distance, abs=0.6)


def test_the_stand_in_knows_the_sub_tasks_of_every_goal_it_can_read():
    """Each goal with a reader must have programs, each of them within the allow-list."""
    goals = set(offline_vlm.READERS) - {offline_vlm.SIGHT}
    assert goals <= set(offline_vlm.SUBTASKS)
    for goal in goals:
        for sentence, _ in offline_vlm.SUBTASKS[goal]:
            code_as_reward.check_source(offline_vlm.write_code(goal, sentence, wrong=False))


def draw_pole(degrees, size=200):
    """A brown pole on a black cart, leaning by so many degrees to the right -> (size, size, 3) uint8."""
    row, column = np.mgrid[:size, :size].astype(float)
    right, down = np.sin(np.radians(degrees)), -np.cos(np.radians(degrees))
    x, y = column - size / 2, row - 0.75 * size
    along, across = x * right + y * down, x * down - y * right
    inside = np.clip(size / 40 + 0.5 - abs(across), 0, 1)[..., None]  # soft edges, as a renderer makes them
    inside = inside * ((along > 0) & (along < 0.4 * size))[..., None]
    image = (255 + inside * (np.array([202, 152, 101]) - 255)).astype(np.uint8)
    image[int(0.75 * size):int(0.82 * size), int(0.4 * size):int(0.6 * size)] = 0
    return image


POLE = "to balance the brown pole on the black cart to be upright"
PIXEL = vlm_query.png_base64(np.zeros((1, 1, 3), np.uint8))


def draw_poles(pairs, seed=0, size=100):
    """-> first, second (M, H, W, 3), right labels (M,); the angles differ by a degree at least."""
    angles = np.random.default_rng(seed).uniform(-25, 25, (2, 2 * pairs))
    angles = angles[:, abs(abs(angles[0]) - abs(angles[1])) > 1][:, :pairs]
    first, second = (np.stack([draw_pole(angle, size) for angle in side]) for side in angles)
    return first, second, (abs(angles[1]) < abs(angles[0])).astype(np.int8)


@pytest.mark.parametrize("size", [64, 100, 200, 300])
def test_the_stand_in_reads_the_poles_angle_from_pixels(size):
    """At every size it must be within a degree of the angle that was drawn."""
    for angle in (-25, -7, -1, 0, 3, 12, 28):
        assert abs(offline_vlm.read_pole(draw_pole(angle, size)) - angle) < 1


@pytest.mark.parametrize("stages", [1, 2])
def test_the_stand_in_labels_by_what_it_sees_and_says_what_it_saw(stages):
    """All labels must be right, and every answer must say that it is no VLM."""
    first, second, right = draw_poles(20)
    records = []
    with OfflineVLM() as url:
        labels, _ = label_pairs(VLM("offline", url=url), first, second, POLE, stages, log=records.append)
    assert (labels == right).all()
    assert all("not a VLM" in text for record in records for text in record["answers"])
    assert all("leans" in record["answers"][0] for record in records)


def test_it_answers_minus_one_where_it_cannot_tell():
    """A difference below the margin, and an image without a pole, must be -1."""
    blank = np.full((200, 200, 3), 255, np.uint8)
    first = np.stack([draw_pole(10), draw_pole(10), blank])
    second = np.stack([draw_pole(-10.2), draw_pole(12), draw_pole(0)])
    with OfflineVLM() as url:
        labels, counts = label_pairs(VLM("offline", url=url), first, second, POLE)
    assert list(labels) == [-1, 0, -1] and counts["unsure"] == 2


def test_mistakes_and_doubts_are_as_frequent_as_told_and_depend_on_the_pair_alone():
    """The same pair must meet the same fate in any order, company and number of stages."""
    first, second, right = draw_poles(150, size=64)
    with OfflineVLM(mistakes=0.2, unsure=0.1) as url:
        vlm = VLM("offline", url=url)
        labels, _ = label_pairs(vlm, first, second, POLE)
        again, _ = label_pairs(vlm, first[::-1], second[::-1], POLE, stages=1, workers=2)
    assert (labels == again[::-1]).all()
    assert 0.04 < (labels == -1).mean() < 0.18 and 0.1 < (labels == 1 - right).mean() < 0.28


def test_another_setting_has_another_name():
    """A cache of answers must never mix up an honest stand-in with a lying one."""
    assert len({OfflineVLM(mistakes=m, seed=s).model for m in (0, 0.2) for s in (0, 1)}) == 4


def test_an_unknown_goal_is_refused_with_the_goals_that_are_known():
    """The client must fail fast, with one line that names them."""
    first, second, _ = draw_poles(1)
    with OfflineVLM() as url, pytest.raises(vlm_query.VLMError, match=f"not a VLM.*{POLE}"):
        label_pairs(VLM("offline", url=url), first, second, "to fly to the moon")


@pytest.mark.parametrize("path, body", [
    ("/chat/completions", b"no json"), ("/chat/completions", b'{"messages": 1}'), ("/chat/completions", b"[]"),
    ("/messages", b'{"messages": []}'), ("/chat/completions", b'{"stream": true, "messages": []}'),
    ("/models/m:generateContent", b'{"contents": [{"parts": [{"inline_data": {"data": "AA=="}}]}]}'),
    ("/chat/completions", b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}')])
def test_a_bad_request_is_a_400_in_the_formats_own_shape(path, body):
    """As the real servers do, and the server must live on."""
    with OfflineVLM() as url:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + path, body)
        assert caught.value.code == 400 and json.load(caught.value)["error"]["message"]


@pytest.mark.parametrize("path, part", [
    ("/messages", {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}),
    ("/chat/completions", {"type": "image", "source": {"media_type": "image/png", "data": PIXEL}})])
def test_an_image_in_the_other_providers_form_is_refused(path, part):
    """A client that mixes the two up must not look right against the stand-in."""
    body = {"max_tokens": 9, "messages": [{"content": [{"type": "text", "text": POLE}, part]}]}
    with OfflineVLM() as url, pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url + path, json.dumps(body).encode())
    assert "no part of type" in json.load(caught.value)["error"]["message"]


def test_a_wrong_media_type_is_refused():
    """A PNG that calls itself JPEG is a 400, as with Anthropic."""
    data = vlm_query.png_base64(draw_pole(0))
    with pytest.raises(offline_vlm.BadQuestion, match="said to be image/jpeg but appears to be image/png"):
        offline_vlm.decode(data, "image/jpeg")


def test_a_wrong_key_is_refused_in_every_format():
    """With key set, any other must be a 401, and the right one must pass."""
    for provider in ("openai/m", "gemini/m", "anthropic/m", "local/m"):
        with OfflineVLM(key="right") as url:
            VLM(provider, url=url, key="right").check_sight()
            with pytest.raises(vlm_query.VLMError, match="check the key"):
                VLM(provider, url=url, key="wrong").check_sight()


def test_both_sight_checks_speak_of_the_same_goal():
    """vlm_query.py and offline_vlm.py import nothing of each other, so a test must hold them equal."""
    assert vlm_query.SIGHT_GOAL == offline_vlm.SIGHT


def test_the_stand_in_keeps_nobody_waiting_for_the_network():
    """Its connections must send small bodies at once, and its queue must hold a burst of workers."""
    assert offline_vlm.Handler.disable_nagle_algorithm and offline_vlm.Server.request_queue_size >= 100


def test_a_stand_in_that_stops_is_gone_for_open_connections_too_and_can_start_again():
    """An outage that is played with stop() must be one, and must not take the latency away for ever."""
    server, body = OfflineVLM(latency=0.2), {"messages": [{"content": offline_vlm.SIGHT}]}
    for _ in range(2):
        with server as url, requests.Session() as session:
            began = time.monotonic()
            assert session.post(url + "/chat/completions", json=body).ok and time.monotonic() - began >= 0.2
            server.stop()
            with pytest.raises(requests.ConnectionError):
                session.post(url + "/chat/completions", json=body)


@pytest.mark.parametrize("goal", ["to open the drawer and put the green ball into it", "to open the drawers"])
def test_a_goal_that_only_begins_like_a_known_one_is_unknown(goal):
    """The stand-in must say that it does not know it, not answer another question."""
    with OfflineVLM() as url, pytest.raises(VLMError, match="knows only these goals"):
        label_pairs(quick(url), gray(1), gray(200), goal)


def test_an_unknown_fault_is_named():
    """A typo must not become a server without faults."""
    with pytest.raises(ValueError, match="no fault '430'"):
        OfflineVLM(faults="430")


@pytest.mark.parametrize("wrong", [{"mistakes": 20}, {"unsure": -0.1}, {"faults": float("nan")}, {"latency": -1},
                                   {"latency": float("nan")}])
def test_a_setting_of_the_stand_in_out_of_range_is_named(wrong):
    """20 for 20 % must not become a server that is always wrong."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OfflineVLM(**wrong)


def test_the_stand_in_knows_the_goal_of_every_built_in_task():
    """Every goal of envs.py must be one of the readers', word for word."""
    assert {task.goal for task in envs.TASKS.values()} <= set(offline_vlm.READERS)


@pytest.mark.parametrize("goal", offline_vlm.READERS)
def test_each_reader_stands_alone_and_its_words_say_what_it_read(goal):
    """Its source must run with numpy only, blank images must not break it, and the sentence must be readable."""
    reader, alone = offline_vlm.READERS[goal], {"np": np}
    exec(inspect.getsource(reader.read), alone)
    for image in (np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), draw_pole(20)):
        assert np.array_equal(alone[reader.read.__name__](image), reader.read(image), equal_nan=True)
    words = f"Image 1: {reader.says.format(value=-2.5)}. Image 2: {reader.says.format(value=7)}."
    assert abs(offline_vlm.find_value(reader, words, 1) + 2.5) < 0.6 and offline_vlm.find_value(reader, words, 2) == 7


def test_the_stand_in_serves_from_the_command_line_and_says_what_it_is():
    """The first line must name it and its URL; a bad flag or a taken port must be one line and exit code 2."""
    command = [sys.executable, offline_vlm.__file__, "--faults", "429 hint", "--port"]
    # trap: what a shell starts in the background ignores SIGINT, and so do its children: hence preexec_fn
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        line = process.stdout.readline()
        url = line.split()[-1]
        VLM("offline", url=url).check_sight()
        taken = subprocess.run([*command, url.split(":")[2].split("/")[0]], capture_output=True, text=True, timeout=600)
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=600)[1]
        finally:
            process.kill()
        assert process.returncode == 0 and said == ""  # Ctrl-C is how it ends: no traceback
    wrong = subprocess.run([*command, "0", "--faults", "430"], capture_output=True, text=True, timeout=600)
    assert "not a VLM" in line and "no fault '430'" in wrong.stderr
    for done in (taken, wrong):
        assert done.returncode == 2 and "Traceback" not in done.stderr
