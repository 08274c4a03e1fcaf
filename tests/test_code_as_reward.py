"""code_as_reward.py: what the lesson leaves out. Hostile programs, processes, kept programs."""
import concurrent.futures
import importlib.util
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import pytest

import code_as_reward
import envs
from support import offline_vlm
from support import run
import vlm_query
from code_as_reward import (
    CodeAsRewardError, Program, ProgramError, ProgramReward, learn_programs, load_programs, verify
)
from test_components import BAD, BLACK, DEF, EXPERT, GOOD, ONES, OTHER, RANDOM, Script, place, square

HOSTILE = {  # name: (program, kinds of verdict that are right with the allow-list, and without it)
    "fork bomb": ("import os\n" + DEF + "\n    while True: os.fork()", "rejected"),
    "endless loop": (DEF + "while True: pass", "timeout"),
    "endless loop in C": (DEF + "return sum(range(10**18))", "timeout"),
    "10 GB array": (DEF + "return np.ones(10**10)", "error"),
    "many arrays": (DEF + "kept = []\n    while True: kept.append(np.ones(10**7))", "error timeout"),
    "giant power": (DEF + "return 9 ** 9 ** 9", "timeout error died"),
    "giant constant": (DEF + "return [0] * 10**12", "error died"),
    "open a file": (DEF + "open('/tmp/code_as_reward_was_here', 'w').write('x')\n    " + ONES, "rejected"),
    "environment": ("import os\n" + DEF + "return [len(os.environ)]", "rejected"),
    "socket": ("import socket\n" + DEF + "socket.create_connection(('1.1.1.1', 53))\n    " + ONES, "rejected"),
    "subclass walk": (DEF + "return ().__class__.__base__.__subclasses__()", "rejected"),
    "globals of a function": (DEF + "return progress.__globals__", "rejected"),
    "format string": (DEF + "return '{0.__class__.__mro__}'.format(images)", "rejected"),
    "match class pattern": (DEF + "match images:\n        case object(__class__=c): return c", "rejected"),
    "getattr": (DEF + "return getattr(images, '__' + 'class__')", "rejected"),
    "eval": (DEF + "return eval('1')", "rejected"),
    "exec": (DEF + "exec('import os')\n    " + ONES, "rejected"),
    "import function": (DEF + "return __import__('os').getpid()", "rejected"),
    "numpy save": (DEF + "np.save('/tmp/code_as_reward_was_here', images)\n    " + ONES, "rejected"),
    "numpy tofile": (DEF + "images.tofile('/tmp/code_as_reward_was_here')\n    " + ONES, "rejected"),
    "numpy load pickle": (DEF + "return np.load('x', allow_pickle=True)", "rejected"),
    "numpy memmap": (DEF + "np.memmap('/tmp/code_as_reward_was_here', mode='w+', shape=9)\n    " + ONES, "rejected"),
    "numpy raw memory": (DEF + "return np.lib.stride_tricks.as_strided(images, (9**9,), (1,))", "rejected"),
    "numpy's own os": (DEF + "return np.lib._datasource.os.getpid()", "rejected"),
    "ctypes": ("import ctypes\n" + DEF + "ctypes.string_at(0)\n    " + ONES, "rejected"),
    "ctypes of an array": (DEF + "return images.ctypes.data_as(None)", "rejected"),
    "write to stdout": ("import os\n" + DEF + "os.write(1, b'x' * 99)\n    " + ONES, "rejected"),
    "print": (DEF + "print('{\"ok\": 1}' * 99)\n    return 'printed'", "error"),
    "NaN": (DEF + "return np.full(len(images), np.nan)", "output"),
    "infinity": (DEF + "return np.full(len(images), np.inf)", "output"),
    "out of range": (DEF + "return np.full(len(images), 7.0)", "output"),
    "object": (DEF + "return [progress] * len(images)", "error"),
    "nothing": (DEF + "return None", "output error"),
    "wrong shape": (DEF + "return images", "output"),
    "too few": (DEF + "return np.ones(len(images) - 1)", "output"),
    "forged object": (DEF + "return np.ndarray((1,), 'O', buffer=np.array([4096, 4096]))", "rejected"),
    "monkey-patch numpy": (DEF + "np.mean = None\n    " + ONES, "rejected"),
    "sleep": ("import time\n" + DEF + "time.sleep(99)\n    " + ONES, "rejected"),
    "deep recursion": (DEF + "return progress(images, first_image)", "error"),
    "regular expression": ("import re\n" + DEF + "re.match('(a+)+$', 'a' * 50 + 'b')\n    " + ONES, "rejected"),
    "kill the parent": ("import os\n" + DEF + "os.kill(os.getppid(), 9)\n    " + ONES, "rejected"),
    "exit": (DEF + "raise SystemExit", "rejected"),
    "class with tricks": ("class A:\n    def __del__(self): pass\n" + DEF + ONES, "rejected"),
    "decorator": (DEF + "@len\n    def f(): pass\n    " + ONES, "error"),
    "write into the images": (DEF + "images[:] = 0\n    " + ONES, "error"),
    "deep brackets": (DEF + "return " + "(" * 3000 + "1" + ")" * 3000, "error died"),
    "many minus signs": (DEF + "return " + "-" * 100000 + "1", "error died"),
    "no Python": ("I am sorry, I cannot do that.", "error"),
    "null byte": (DEF + "return '\0'", "error"),
    "another function": ("def reward(image):\n    return 1", "rejected"),
    "endless top level": ("while True: pass\n" + DEF + ONES, "timeout"),
}


def verdict(source, seconds=0.7):
    """(kind of failure or "fine", seconds) of one program on three black images."""
    start = time.monotonic()
    program = Program(source, seconds=seconds)
    try:
        program(BLACK, BLACK[0])
        kind = "fine"
    except ProgramError as error:
        kind = error.kind
    program.close()
    return kind, time.monotonic() - start


def test_every_hostile_program_ends_as_a_clear_verdict_and_changes_nothing(tmp_path, monkeypatch):
    """Each of 51 attacks must end as its kind of failure, however busy the machine, write no file, and leave us alive."""
    trace = pathlib.Path("/tmp/code_as_reward_was_here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = dict(zip(HOSTILE, pool.map(verdict, *zip(*(
            (source, 0.7 if "timeout" in right else 60) for source, right in HOSTILE.values())))))
    wrong = {name: found[name][0] for name, (_, right) in HOSTILE.items() if found[name][0] not in right.split()}
    assert len(HOSTILE) >= 30 and not wrong
    assert max(seconds for _, seconds in found.values()) < 200
    assert not trace.exists() and not list(tmp_path.iterdir())


def test_the_kernel_layers_hold_when_the_allow_list_is_taken_away(tmp_path, monkeypatch):
    """With the allow-list and the curated builtins cut out, the attacks on the machine must still fail."""
    text = pathlib.Path(code_as_reward.__file__).read_text()
    bare = text.replace('batch = check_source(message["source"])', "batch = True")
    bare = bare.replace('space = {"__builtins__": safe,', 'space = {"__builtins__": builtins,')
    assert bare.count("batch = True") == bare.count('"__builtins__": builtins,') == 1
    (tmp_path / "bare.py").write_text(bare)
    spec = importlib.util.spec_from_file_location("bare", tmp_path / "bare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bare", module)
    spec.loader.exec_module(module)
    trace = tmp_path / "was_here"
    attacks = {"file": f"open({str(trace)!r}, 'w')", "fork": "__import__('os').fork()", "kill":
               "__import__('os').kill(__import__('os').getppid(), 9)", "socket":
               "__import__('_socket').socket()", "run": "__import__('os').execv('/bin/true', ['true'])"}
    program = module.Program(DEF + ONES)
    program(BLACK, BLACK[0])
    if "system-calls" not in program.active:
        pytest.skip("no system-call filter here; cure: Linux on x86-64 or arm64 with CONFIG_SECCOMP_FILTER (in a "
                    "container that forbids it: --security-opt seccomp=unconfined)")
    for name, attack in attacks.items():
        with pytest.raises(module.ProgramError, match="PermissionError|ModuleNotFound"):
            module.Program(DEF + attack + "\n    " + ONES)(BLACK, BLACK[0])
        assert not trace.exists(), name


def test_random_play_gets_only_the_time_the_expert_needs():
    """An easy sub-task that chance completes after the expert would have must not count as a false completion."""
    late = [square(np.r_[np.full(12, 12), 24, 24])] * 10
    assert verify(lambda p, first: place(p), EXPERT, late, last=False).rates["false_rate"] == 0


def test_a_programs_process_ends_with_its_owner_and_its_folder_goes():
    """close(), and the end of the last one who holds it, must kill the process and remove its folder."""
    for end in (Program.close, lambda program: None):
        program = Program(DEF + ONES)
        program(BLACK, BLACK[0])
        pid, folder = program.process.pid, os.readlink(f"/proc/{program.process.pid}/cwd")
        end(program)
        del program
        assert not os.path.exists(folder) and not os.path.exists(f"/proc/{pid}")


def test_a_garbled_answer_is_a_verdict_and_nothing_of_it_is_unpickled():
    """An answer that is no JSON object, or longer than it may be, must end the program as died."""
    for answer, says in ((b"\x80\x04.", "died"), (b"[1]", "died"), (b"[" * 9000, "died"), (b"x" * 20_000, "died"),
                         (b"{}", "3 bytes for")):
        program, (ours, theirs) = Program(DEF + ONES), multiprocessing.Pipe()
        program(BLACK, BLACK[0])
        program.pipe = ours
        theirs.send_bytes(answer)
        theirs.send_bytes(b"123")
        with pytest.raises(ProgramError, match=says):
            program(BLACK, BLACK[0])


def test_a_program_may_use_names_that_are_not_ascii():
    """Python loads its table of characters for them, after no file opens any more; disguised builtins stay out."""
    program = Program(DEF + "größe = θ = 1.0\n    return np.full(len(images), größe * θ)")
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()
    with pytest.raises(ProgramError, match="rejected: .*eval is not available"):
        Program(DEF + "return \uff45\uff56\uff41\uff4c('1')")(BLACK, BLACK[0])  # full-width letters


@pytest.mark.parametrize("source, kind", [("import os\n" + DEF + ONES, "rejected"), (DEF + "return (", "error: SyntaxError")])
def test_a_program_that_was_refused_is_refused_again(source, kind):
    """The second call must get the first one's verdict, not an answer from a process without a program."""
    program = Program(source)
    for _ in range(2):
        with pytest.raises(ProgramError, match=kind):
            program(BLACK, BLACK[0])
    assert program.process is None


def test_images_of_a_wrong_kind_are_not_blamed_on_the_program():
    """A first image in float32, or one of another size, must be named as what is wrong."""
    program = Program(DEF + ONES)
    for first in (BLACK[0].astype(np.float32), np.zeros((9, 9, 3), np.uint8)):
        with pytest.raises(ValueError, match="first_image one of them"):
            program(BLACK, first)


def test_a_program_that_prints_does_not_garble_its_answer():
    """What it prints must vanish: its standard output leads nowhere."""
    program = Program(DEF + "print('x' * 100000)\n    " + ONES)
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()


def test_an_interrupted_call_leaves_no_answer_for_the_next(monkeypatch):
    """After Ctrl-C between question and answer, the next call must get its own answer."""
    program, wait = Program(DEF + "return images.mean(axis=(1, 2, 3)) / 255"), multiprocessing.connection.Connection.recv_bytes
    gray = [np.full((1, 8, 8, 3), value, np.uint8) for value in (50, 100)]
    program(gray[0], gray[0][0])
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        program(gray[0], gray[0][0])
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", wait)
    assert program(gray[1], gray[1][0]) == pytest.approx(100 / 255)
    program.close()


def test_a_batch_larger_than_a_message_comes_back_whole_and_in_order():
    """Images are sent in several messages; every value must come back in its place."""
    images = np.zeros((300, 100, 100, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(300) % 256
    program = Program(DEF + "return images[:, 0, 0, 0] / 255")
    assert np.allclose(program(images, images[0]) * 255, np.arange(300) % 256)
    program.close()


def test_images_share_messages_on_their_way_to_a_program():
    """2,000 images of 100 px, 60 MB, must go in messages of a megabyte, not one by one. bench.py says how fast."""
    program, images, sent = Program(DEF + ONES), np.zeros((2000, 100, 100, 3), np.uint8), []
    program(images[:1], images[0])
    program._exchange = lambda *message, real=program._exchange: sent.append(1) or real(*message)
    assert program(images, images[0]).shape == (2000,) and 1 < len(sent) < 100
    program.close()


@pytest.mark.parametrize("last, frame", [(True, 11), (False, 5)])
def test_a_missed_completion_is_shown_where_it_should_have_been_seen(last, frame):
    """Of the goal the last image must go back to the VLM, of an earlier sub-task the best one."""
    def program(p, first):
        return 0.9 * (np.arange(len(p)) == 5)
    failure = verify(program, EXPERT, RANDOM, last=last).failures[0]
    assert failure["check"] == "hit_rate" and np.array_equal(failure["image"], EXPERT[0][frame])


def test_a_failing_program_is_a_failing_report():
    """NaN in the sandbox must end as verdict fail with the reason, not as an exception."""
    report = verify(Program(DEF + "return np.full(len(images), np.nan)"), EXPERT, RANDOM)
    assert report.verdict == "fail" and "NaN" in report.reasons[0]


def test_a_goal_reached_at_the_start_is_no_negative_example():
    """Where success says that the start is the goal already, frozen must not count it; none left: an error."""
    upright = [square(np.full(12, 24))] * 5
    success = [place(e) >= 0.95 for e in EXPERT + upright]
    report = verify(lambda p, first: place(p), EXPERT + upright, RANDOM, success=success)
    assert report.verdict == "pass" and report.rates["frozen"] == 0
    with pytest.raises(CodeAsRewardError, match="start short of the goal"):
        verify(lambda p, first: place(p), upright, RANDOM, success=success[-5:])


def rooms(key, door, agent):
    """A room as MiniGrid draws it, 6 cells of 8 px: key on the floor?, door locked?, column of the agent."""
    image = np.full((48, 48, 3), 100, np.uint8)
    image[8:40, 8:40] = 0
    image[8:40, 24:32] = 100
    image[16:24, 24:32] = (114, 114, 0) if door else (0, 0, 0)
    image[16:24, 31] = (200, 200, 0)
    image[32:40, 32:40] = (0, 255, 0)
    if key:
        image[26:38, 11:14] = (255, 255, 0)
    row = 34 if agent == 34 else 18
    image[row:row + 4, agent:agent + 4] = (255, 0, 0)
    return image


ERRAND = ([(1, 1, 18)] * 2 + [(0, 1, 10)] * 2 + [(0, 1, 18)] + [(0, 0, 18)] + [(0, 0, 26)] + [(0, 0, 34)])
KEY_GONE = """
def gone(images):
    yellow = (images[..., 0] > 200) & (images[..., 1] > 200) & (images[..., 2] < 50)
    return yellow[:, :, :22].sum(axis=(1, 2)) < 5
"""


def test_the_published_doorkey_program_is_rejected():
    """It gives half a point in every frame without a key, whatever the door does, and nothing at the goal."""
    expert = [np.stack([rooms(*state) for state in ERRAND])] * 10
    random = [np.stack([rooms(1, 1, 10 + (i + t) % 10) for t in range(8)]) for i in range(10)]
    success = [np.arange(8) == 7] * 10
    literal = Program(KEY_GONE + DEF + "return gone(images) * 0.5")
    summed = Program(KEY_GONE + DEF + "return gone(images) * 0.5 + gone(images) * 0.5")  # key, and "door"
    picked = Program(KEY_GONE + DEF + "return (gone(images) & ~gone(first_image[None])) * 1.0")
    reports = {"once": verify(literal, expert, random, success=success),
               "as the goal": verify(summed, expert, random, success=success),
               "as the door": verify(summed, expert, random, earlier=[picked], last=False)}
    assert [r.verdict for r in reports.values()] == ["fail"] * 3
    assert reports["once"].rates["hit_rate"] == 0
    assert reports["as the goal"].rates["too_soon"] == reports["as the door"].rates["too_soon"] == 1
    assert verify(picked, expert, random, last=False).verdict == "pass"  # its part about the key is right
    for program in (literal, summed, picked):
        program.close()


def test_frames_on_which_a_program_fails_earn_nothing():
    """One bad image must score 0 and be counted, the others keep their value; a timeout must stop the run."""
    source = "def progress(image, first_image):\n    return 51 / int(image[0, 0, 0])"
    images = np.full((5, 8, 8, 3), 102, np.uint8)
    images[3] = 0
    with ProgramReward([source]) as reward:
        assert np.allclose(reward.predict(images), [-0.5, -0.5, -0.5, -1, -0.5]) and reward.failed_frames == 1
    slow = ProgramReward([Program(DEF + "while True: pass", seconds=0.3)], ["wait"])
    with pytest.raises(CodeAsRewardError, match="'wait'.*timeout"):
        slow.predict(images)


def test_after_the_last_round_the_run_stops_and_names_the_sub_task():
    """R wrong programs must end in an error with sub-task and reason; go_on must leave out an earlier one."""
    with pytest.raises(CodeAsRewardError, match="'at the edge'.*2 rounds.*start is called completed"):
        learn_programs(Script("1. at the edge", BAD, BAD), EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, RANDOM, rounds=2)
    ask = Script("1. half way\n2. at the edge", BAD, "no idea", GOOD)
    reward, reports = learn_programs(ask, EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, RANDOM, rounds=2, go_on=True)
    reward.close()
    assert reward.subtasks == ["at the edge"] and [r.verdict for r in reports] == ["fail", "fail", "pass"]


def test_programs_that_are_not_all_cannot_be_loaded(tmp_path):
    """Of an attempt that stopped at the second sub-task, the first one's program alone must not become a reward, and a
    new attempt must not keep it."""
    half = Script("1. half way\n2. at the edge", GOOD.replace("/ 24", "/ 12").replace("return ", "return np.minimum(1, ")
                  .replace("/ 12", "/ 12)"), BAD)
    task = EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, [e[:1] for e in EXPERT]
    with pytest.raises(CodeAsRewardError, match="'at the edge'"):
        learn_programs(half, *task, rounds=1, folder=tmp_path)
    assert len(list(tmp_path.glob("programs/*.py"))) == 1
    for folder in (tmp_path, tmp_path / "programs"):
        with pytest.raises(CodeAsRewardError, match="are not all"):
            load_programs(folder)
    learn_programs(Script("1. at the edge", GOOD), *task, folder=tmp_path)[0].close()
    with load_programs(tmp_path) as again:
        assert again.subtasks == ["at the edge"]
    (tmp_path / "programs" / "1_x.py").write_bytes(b"# \xff")
    with pytest.raises(CodeAsRewardError, match="no UTF-8"):
        load_programs(tmp_path)


def test_verification_wants_a_success_for_every_frame():
    """Success of too few episodes, or of too few frames, must be refused: it would let a wrong program pass."""
    success = [np.zeros(len(episode), bool) for episode in EXPERT]
    for wrong in (success[:1], [*success[:-1], success[-1][1:]]):
        with pytest.raises(ValueError, match="a value per frame"):
            verify(lambda images, first: place(images), EXPERT, RANDOM, success=wrong)


def test_a_foreign_folder_of_programs_meets_the_allow_list_again(tmp_path):
    """A program that was edited into an attack must be refused before it runs."""
    (tmp_path / "1_x.py").write_text("# sub-task: x\nimport os\n" + DEF + ONES)
    with pytest.raises(CodeAsRewardError, match="import os is not allowed"):
        load_programs(tmp_path)
    with pytest.raises(CodeAsRewardError, match="no programs"):
        load_programs(tmp_path / "nowhere")


def test_a_program_lives_on_when_the_thread_that_started_it_has_ended():
    """The kernel kills a child with the thread that started it: that must not be the one that asked first."""
    program = Program(DEF + ONES)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(program, BLACK, BLACK[0]).result()
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()


def test_the_stand_in_writes_a_wrong_program_is_told_and_puts_it_right():
    """CartPole over HTTP with every first program wrong: round 1 must fail, round 2 pass, in 3 calls."""
    env, goal = envs.make("CartPole"), envs.TASKS["CartPole"].goal
    episodes = code_as_reward.collect_episodes(env, envs.expert(env), size=64, seed=run.FRESH_SEED)
    start, end = episodes["expert_episodes"][0][[0, -1]]
    server = offline_vlm.OfflineVLM(mistakes=1.0)
    with server as url:
        ask = vlm_query.VLM("offline/stand-in", url=url).ask
        reward, reports = learn_programs(ask, start, end, goal, other_episodes=OTHER[:1], **episodes)
    reward.close()
    assert [r.verdict for r in reports] == ["fail", "pass"] and sum(server.requests.values()) == 3
