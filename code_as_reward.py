"""VLM-CaR, Code as Reward: the VLM writes a program per sub-task; verified, they are the reward.

STEPs C1 to C4 replace STEPs 2 to 5: C1 describe the sub-tasks, C2 write a program for each, C3
verify it and send failures back, C4 pay
    reward of a picture = Phi - 1,   Phi = (s + p_s) / K  in [0, 1]   (train.py adds success)
s: sub-tasks completed so far, in order (progress p >= 0.95); p_s: progress in the current one. All
stay completed until the episode ends but the last, the goal: leaving it stops the pay.
Why not the potential difference Phi' - Phi? Its sum is Phi(end) - Phi(start): balancing earns no
more than ending upright. Phi - 1 pays most for arriving soon and staying. (Where the goal ends the
episode, as in DoorKey, the difference learned faster: README. --potential difference)

Differs from the paper (its published code cannot run): 1. programs see (images, first image), and
no name they bind survives: no episode leaks into the next; 2. distinct sub-tasks in order count,
not paid frames; 3. more negatives: backwards, frozen, another task, too soon; 4. failures go back
as text and pictures; 5. Phi - 1, for a bonus on every frame is earned by standing still.

Sandbox: an allow-list over the syntax tree; its own process without environment in an empty folder;
limits on time, memory, files, processes; on Linux (x86-64, arm64) a system-call filter: no network.
NOT covered: bugs of kernel, Python or numpy; numbers left in uninitialised memory (where=, "empty"
padding); a busy core until the limit; network and system calls on macOS; Windows (refuses); wrong
programs that C3 lets pass.

Shapes: T frames of an episode, N images, K sub-tasks. ask(list of str | (H,W,3)) -> has .text
To use it elsewhere:
    import numpy as np
    from code_as_reward import ProgramReward
    source = "def progress(images, first_image):\\n    return images.mean(axis=(1, 2, 3)) / 255"
    with ProgramReward([source]) as reward:
        print(reward.predict(np.zeros((4, 64, 64, 3), np.uint8)))  # four black pictures: -1 each
"""
import ast
import builtins
import ctypes
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

DONE = 0.95  # progress at which a sub-task counts as completed; asking for 1 would punish rounding
HIT_RATE = 0.95  # share of expert episodes that a program must see completed
FALSE_RATE = 0.10  # share of the negative episodes of a kind that it may wrongly see completed
FALL_BACK = 0.20  # how far progress may fall below its best while the expert works on the sub-task
MEMORY = 2 << 30  # bytes of address space of one program
BATCH_BYTES = 1 << 20  # pixels in one message: float64 copies of them are far from MEMORY
BATCH_SECONDS, START_SECONDS = 5.0, 60.0  # wall clock: for one message; for numpy to load at first
CPU_SECONDS = 600  # of one process; a fresh one takes over well before


class CodeAsRewardError(Exception):
    """No reward can be made: the message names the sub-task and says what failed.

    questions: a list of `parts`, the questions whose answers led to it. Whoever keeps answers has
    to forget these, or the same comes of them for ever.
    """

    def __init__(self, message, questions=()):
        super().__init__(message)
        self.questions = list(questions)


class ProgramError(Exception):
    """A program failed. kind: rejected (by the allow-list), error, output, timeout or died."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {one_line(message)}")
        self.kind = kind


# ---- what strangers write, the VLM and its programs, comes in through here ----
def cleaned(text):
    """str or None -> str of what can be seen, line breaks and tabs.

    trap: escape codes command the terminal they are printed on, a NUL is no Python, half of a
    surrogate pair cannot be written to a file.
    """
    codes = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*"  # colours; titles of windows
    text = re.sub(codes, "", "\n".join((text or "").splitlines()))
    # the last two of these join letters, in Persian for one
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else " " * c.isspace()
                   for c in text)


def one_line(text):
    return " ".join(cleaned(text).split())


def answer_in(text):
    """The answer, cleaned. trap: the thoughts of a model that thinks first hold lists and code."""
    return cleaned(text).rpartition("</think>")[2]


# ---- what a program may say: the allow-list over its syntax tree ----
NODES = tuple(getattr(ast, name) for name in """Module FunctionDef arguments arg Return Assign
    AugAssign AnnAssign For While If Expr Pass Break Continue BoolOp BinOp UnaryOp Lambda IfExp Dict
    Set ListComp SetComp DictComp GeneratorExp comprehension Compare Call keyword JoinedStr
    FormattedValue Constant Attribute Subscript Starred Name List Tuple Slice Import alias Try
    ExceptHandler Raise Assert With withitem NamedExpr operator unaryop boolop cmpop
    expr_context""".split())
BUILTINS = """abs all any bool dict divmod enumerate filter float frozenset int isinstance len list
    map max min pow print range reversed round set slice sorted str sum tuple zip Exception
    ArithmeticError IndexError KeyError RuntimeError TypeError ValueError
    ZeroDivisionError""".split()
# Attributes of anything: functions of math, numpy and numpy.linalg, methods of arrays and lists.
# trap: numpy opens files (load, tofile, memmap), unpickles, reaches raw memory (ctypeslib, and
# ndarray(buffer=)): a deny-list misses the next such function. And "{0.__class__}".format(x) hides
# a name: no format.
ATTRIBUTES = {name for name in dir(math) if name[0] != "_"} | set("""
    abs add all allclose any append arange arctan arctan2 argmax argmin argsort argwhere array
    array_equal asarray astype average bincount ceil clip column_stack concatenate convolve copy
    cos count count_nonzero cumprod cumsum diag diagonal diff digitize dot dtype einsum
    errstate exp expand_dims extend eye fill flatnonzero flatten flip fliplr flipud
    float32 float64 floor full full_like get gradient histogram hstack hypot index inf int16 int32
    int64 interp isclose isfinite isin isinf isnan item items keys linalg linspace log log10 log1p
    log2 logical_and logical_not logical_or logical_xor matmul max maximum mean median meshgrid min
    minimum nan nan_to_num nanmax nanmean nanmedian nanmin nansum ndim newaxis nonzero norm
    ones ones_like outer pad percentile pi polyfit pop power prod quantile ravel repeat reshape
    roll rot90 round searchsorted shape sign sin size sort split sqrt square squeeze stack std sum
    swapaxes T take take_along_axis tan tanh tile tolist transpose uint16 uint32 uint8 unique
    unravel_index values var vstack where zeros zeros_like""".split())


def check_source(source):
    """Raise ProgramError unless all of it is on the allow-list -> does it take whole batches?

    Runs in the sandbox only: even to parse a hostile text is a risk (nesting can crash Python).
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kind, why = type(node).__name__, None
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        hidden = [n for n in names if isinstance(n, str) and n[0] == "_" and n != "_"]
        if not isinstance(node, NODES):
            why = f"{kind} is not allowed, only plain functions"
        elif hidden:
            why = f"the name {hidden[0]} begins with an underscore"
        elif kind == "Name" and hasattr(builtins, node.id) and node.id not in BUILTINS:
            why = f"{node.id} is not available"
        elif kind == "Attribute" and node.attr not in ATTRIBUTES:
            why = f".{node.attr} is not available"
        elif kind == "Attribute" and not isinstance(node.ctx, ast.Load):  # np.mean = None
            why = f"assigning to .{node.attr} is not allowed"
        elif kind == "alias" and node.name not in ("numpy", "math"):
            why = f"import {node.name} is not allowed, only numpy and math"
        if why:
            raise ProgramError("rejected", f"line {getattr(node, 'lineno', 1)}: {why}")
    tops = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "progress"]
    arguments = [a.arg for a in tops[-1].args.args] if tops else []
    if arguments not in (["images", "first_image"], ["image", "first_image"]):
        raise ProgramError("rejected", "it must define progress(images, first_image) or"
                           " progress(image, first_image)")
    return arguments[0] == "images"


# ---- the inside of the sandbox: this part runs in the child process ----
SYSTEM_CALLS = {  # machine: (its audit number, what is left: read, write, memory, signals, exit)
    "x86_64": (0xC000003E, (0, 1, *range(9, 16), 24, 25, 28, 60, 131, 202, 228, 231, 318)),
    "aarch64": (0xC00000B7, (63, 64, 93, 94, 98, 113, 124, 132, 134, 135, 139, 214, 215, 216,
                             222, 226, 233, 278))}


def _filter_system_calls(libc):
    """seccomp: the kernel refuses every other call: no open, socket, fork, kill."""
    audit, calls = SYSTEM_CALLS[os.uname().machine]
    load, jump_if_equal, back, refuse, allow = 0x20, 0x15, 0x06, 0x00050001, 0x7FFF0000
    # each step: (what, steps to skip if equal, steps to skip if not, operand)
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, audit), (back, 0, 0, refuse), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    steps += [(back, 0, 0, refuse), (back, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    return libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _lock_down():
    """Give up all that reading pictures does not need -> names of the layers that hold."""
    import resource  # Linux and macOS only
    active, libc = [], ctypes.CDLL(None)
    for name, limit in dict(CPU=CPU_SECONDS, AS=MEMORY, FSIZE=0, NOFILE=8, NPROC=0).items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
            active.append("limit-" + name.lower())
        except (ValueError, OSError):  # macOS refuses some
            pass
    if sys.platform == "linux":
        if libc.prctl(1, int(signal.SIGKILL), 0, 0, 0) == 0:
            active.append("dies-with-parent")
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the filter asks for
        if os.uname().machine in SYSTEM_CALLS and _filter_system_calls(libc):
            active.append("system-calls")
    return active


def _serve(pipe):
    """Answer messages: a JSON object, then raw bytes, both ways."""
    # trap: Python (a name like größe: unicodedata) and numpy (median: ma) load parts late; soon no
    # file opens
    import unicodedata  # noqa: F401

    import numpy.ma  # noqa: F401
    np.seterr(all="ignore")
    active = _lock_down()
    gc.freeze()  # what is there by now stays
    while True:
        message, pixels, answer, raw = json.loads(pipe.recv_bytes()), pipe.recv_bytes(), {}, b""
        try:
            if "source" in message:  # the first message
                batch = check_source(message["source"])
                code = compile(message["source"], "<program>", "exec")
                answer = {"active": active}
            else:  # (1+N, H, W, 3), read-only: the first image, then the others
                images = np.frombuffer(pixels, np.uint8).reshape(message["shape"])
                raw = _run_program(code, batch, images[1:], images[0]).tobytes()
        except Exception as error:  # whatever goes wrong in a program is its verdict
            lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                     if frame.f_code.co_filename == "<program>"]
            text = f"error: {type(error).__name__}: {error} (line {lines[-1] if lines else '?'})"
            answer["error"] = str(error if isinstance(error, ProgramError) else text)[:800]
        pipe.send_bytes(json.dumps(answer).encode())
        pipe.send_bytes(raw)
        gc.collect()  # trap: a batch's functions and arrays hold each other, up to the memory limit


def _run_program(code, batch, images, first_image):
    """Run the program afresh: no name it bound in the last batch survives -> (N,) float64"""
    # trap: numpy's C code, too, imports its parts through the builtins of its caller.
    safe = {name: getattr(builtins, name) for name in [*BUILTINS, "__import__"]}
    space = {"__builtins__": safe, "np": np, "math": math}
    exec(code, space)
    if batch:
        out = space["progress"](images, first_image)
    else:
        out = [float(space["progress"](image, first_image)) for image in images]
    out = np.array(out, dtype=np.float64)
    if out.shape != (len(images),):
        raise ProgramError("output", f"{len(images)} images gave a result of shape {out.shape}")
    return out


# ---- the outside of the sandbox: one long-lived process per program ----
BOOT = ("import sys, runpy; sys.path.append(sys.argv[2]);"
        "runpy.run_path(sys.argv[1], run_name='sandbox')")


def _end(process, pipe, keeper):
    """Kill the process, and let go of the thread that started it."""
    process.kill()
    process.wait()
    pipe.close()
    keeper.shutdown(wait=False)


class Program:
    """program(images (N,H,W,3) uint8, first_image (H,W,3)) -> (N,) float32, or ProgramError.

    The process starts at the first call and stays until close() or the end of this object; a batch
    that takes over `seconds` kills it.
    """

    def __init__(self, source, seconds=BATCH_SECONDS):
        if os.name != "posix":
            raise CodeAsRewardError("the sandbox needs Linux or macOS (on Windows: WSL)")
        self.source, self.seconds = source, seconds
        self.process, self.active, self.busy = None, [], 0.0  # active: layers that hold
        self._turn = threading.Lock()  # trap: two threads would get each other's answers

    def __call__(self, images, first_image):
        images, first_image = np.asarray(images), np.asarray(first_image)
        if (images.ndim != 4 or images.shape[1:] != first_image.shape
                or not images.dtype == first_image.dtype == np.uint8):
            raise ValueError("images must be (N,H,W,3) uint8 and first_image one of them, not "
                             f"{images.shape} {images.dtype} and {first_image.shape} "
                             f"{first_image.dtype}")
        step = max(1, BATCH_BYTES // first_image.nbytes)  # pictures in one message
        with self._turn:
            if (self.process is None or self.process.poll() is not None
                    or self.busy > CPU_SECONDS / 2):
                self._start()
            parts = [self._batch(images[i:i + step], first_image)
                     for i in range(0, len(images), step)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def _start(self):
        self.close()
        self.pipe, theirs = Pipe()
        # -s: no user's packages; -S: no site hooks. numpy's place is handed over.
        command = [sys.executable, "-s", "-S", "-B", "-c", BOOT, os.path.abspath(__file__),
                   os.path.dirname(os.path.dirname(np.__file__)), str(theirs.fileno())]
        # trap: BLAS would start threads, and they count as processes.
        env = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # trap: otherwise a set of words has another order in each process. (-I would not hear it.)
        env |= {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
        # trap: "dies with its parent" means the *thread* that started it, so that has to live on.
        keeper = ThreadPoolExecutor(1)
        # The folder goes when the child is in it: kill -9 leaves none, and nothing can be put there
        with tempfile.TemporaryDirectory(prefix="program-") as folder:
            self.process = keeper.submit(
                subprocess.Popen, command, env=env, cwd=folder, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True).result()  # Ctrl-C is ours, not theirs
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self.process, self.pipe, keeper)
        self.busy = 0.0
        message = {"source": self.source}
        try:
            self.active = self._exchange(message, b"", START_SECONDS)[0]["active"]
        except ProgramError:
            self.close()  # trap: a process without a program would answer the next call
            raise
        if sys.platform == "linux" and "system-calls" not in self.active:
            warnings.warn("the sandbox has no system-call filter on this machine")

    def _batch(self, images, first_image):
        pixels = first_image.tobytes() + images.tobytes()
        message = {"shape": (1 + len(images), *first_image.shape)}
        raw = self._exchange(message, pixels, self.seconds)[1]
        if len(raw) != 8 * len(images):
            raise ProgramError("output", f"{len(raw)} bytes for {len(images)} images")
        out = np.frombuffer(raw, np.float64)  # (N,)
        bad = int((~np.isfinite(out)).sum())
        if bad:
            raise ProgramError("output", f"NaN or infinity on {bad} of {len(images)} images")
        if out.min() < -1e-6 or out.max() > 1 + 1e-6:
            raise ProgramError("output", f"not in [0, 1]: {out.min():.3g} to {out.max():.3g}")
        return np.clip(out, 0, 1).astype(np.float32)

    def _exchange(self, message, pixels, seconds):
        """Send a message and wait for the answer -> (dict, bytes)"""
        killer, start = threading.Timer(seconds, self.process.kill), time.monotonic()
        killer.start()  # it ends whatever we may wait for below
        try:
            self.pipe.send_bytes(json.dumps(message).encode())
            self.pipe.send_bytes(pixels)
            # trap: only JSON and raw numbers of limited size come back: to unpickle is to run code.
            answer = dict(json.loads(self.pipe.recv_bytes(10_000)))
            raw = self.pipe.recv_bytes(BATCH_BYTES)
        except (OSError, EOFError, ValueError, TypeError, RecursionError):
            late = time.monotonic() - start > 0.99 * seconds
            self.close()
            if late:
                raise ProgramError("timeout", f"no answer within {seconds:g} s") from None
            raise ProgramError("died", "it ended (a limit, or a crash) or garbled") from None
        except BaseException:  # Ctrl-C
            # trap: the answer that is under way would be taken for that of the next call
            self.close()
            raise
        finally:
            killer.cancel()
        self.busy += time.monotonic() - start
        if "error" in answer:
            kind, _, text = str(answer["error"]).partition(": ")
            raise ProgramError(kind if kind in ("rejected", "output") else "error", text)
        return answer, raw

    def close(self):
        if self.process is not None:
            self._finalizer()
            self.process = None


# ---- STEP C1: describe the sub-tasks ----
def describe_subtasks(ask, start_image, goal_image, goal):
    """Ask for the ordered sub-tasks that a picture can show -> list of 1 to 5 sentences."""
    question = [
        f"The goal is {goal}.\nThis picture shows the start:", start_image,
        "This picture shows the goal reached:", goal_image,
        "List the sub-tasks on the way from the start to the goal, in the order in which they must"
        " be done. Name only sub-tasks whose completion can be seen in a single picture of this"
        " kind, held against the first picture of the episode. Use as few as possible and five"
        " at most; one is enough where no stage lies in between. The last is the goal itself.\n"
        "Answer with a numbered list, one short sentence per line, and nothing else."]
    text = ask(question).text
    found = read_list(answer_in(text))
    if not 1 <= len(found) <= 5:
        raise CodeAsRewardError(f"the VLM was asked for a list of 1 to 5 sub-tasks and gave "
                                f"{len(found) or 'none that can be read'}: {str(text)[:200]!r}",
                                [question])
    return list(dict.fromkeys(found[::-1]))[::-1]  # of two that are alike the later: the goal


# How an entry of a list begins: "- ", "* [ ] ", "•"; "1. ", "(2) ", "a) ", "iv. ", "Step 3: ",
# "Sub-task 4 (goal) - ", "5 The", "第一步：" ...
ITEM = re.compile(r"""(?P<indent>\s*) (?:[>\#]+\s+)*
    (?P<bullet>[^\w\s"'(\[{<|]\s+|[•●▪◦‣·])? (?:\[[ xX]?\]\s+)?
    (?P<label>[(\[（]? (?P<word>(?:[^\W\d_]+[-\s]){0,3}) [\#№]?
        (?:[^\W\d_]{0,8}?(?P<number>\d{1,2}|[一二三四五])[^\W\d_]{0,2}
           | (?i:[ivx]+|[a-e])(?=[).:\]]+(?:\s|$)))
        (?:\s?\([^()]*\))?
        (?:\s?[).:\]）．：、]+-?(?!\d) | \s[-–—]\s | (?<=\d)\s+(?=[A-Z]) | $))?
    \s*(?P<text>.*)""", re.VERBOSE)


def read_list(text):
    """A list in nearly any notation -> its entries in order; [] where some are missing.

    What is nested in an entry or explains it is left out, and so are other lists, such as notes.
    """
    lists, last, intro, blank, over = [], None, "", True, False
    text = re.sub(r"(?<=\S) +", " ", _from_json(text).expandtabs(4))
    text = re.sub(r"(?<=[.;,!?]) (?=\(?[2-5][.):] )", "\n", text)  # all of it in one line
    for line in text.split("\n"):
        if not line.strip():
            blank = True
            continue
        line = line[:1000]  # trap: patterns take for ever over a line without end
        # the row of a table; then bold and tags; then a number that is drawn as one sign
        line = re.sub(r"^ *\|[^\w|]*([^|]*?\d+)[^\w|]*\|([^|]*).*", r"\1: \2", line)
        head = line.startswith("#") or line.lstrip()[:2] == line.rstrip()[-2:] in ("**", "__")
        line = re.sub(r"\*\*|__|`|\*(?=\S)|(?<=\S)\*|<[^<>]{1,20}>", "", line).rstrip()
        line = re.sub(r"[①-⑨⑴-⑼⒈-⒐❶-❾]|\d\ufe0f?\u20e3",
                      lambda sign: f"{unicodedata.digit(sign[0][0])}. ", line, count=1)
        item = ITEM.fullmatch(line)
        if item["bullet"] or item["label"]:
            number = item["number"] and int(unicodedata.numeric(item["number"][-1]))
            kind = (len(item["indent"]) // 2, (item["bullet"] or "").strip(), bool(item["label"]),
                    bool(item["word"]), number is None)
            same = [one for one in lists if one.kind == kind
                    and (one.open or number and one.numbers[-1] == number - 1)]
            if not same:  # no list that this goes on with: it begins one
                same = [types.SimpleNamespace(kind=kind, intro=intro, numbers=[], texts=[])]
                lists += same
            last, intro, over = same[-1], "", head and item["text"]
            last.open = True
            last.numbers.append(number)
            last.texts.append(item["text"])
        else:
            said = last.texts[-1][-999:] if last else "."
            over = over or len(said) == 999 or re.search(r"[.!?;。]\W{0,9}$", said)
            if last and not (said and (over or head or blank) or re.match(r"\w+ ?:", line)):
                last.texts[-1] = f"{said} {line.strip()}"  # the sentence goes on in the next line
            elif head or line[:1] != " " and line[-1:] in (":", "："):  # "Notes:"
                intro, last = line, None
                for one in lists:
                    one.open = False
        blank = False
    if not lists:
        return []
    # the one that is called so, is not nested, has numbers, comes first
    best = max(lists, key=lambda one: ("task" in one.intro.lower(), -one.kind[0], one.kind[2]))
    count = len(best.numbers)
    if best.numbers not in ([None] * count, [1] * count, [*range(count)], [*range(1, 1 + count)]):
        return []
    found = [one_line(text).strip("\"'“” ") for text in best.texts]
    return [text for text in found if re.search(r"\w", text)]


def _from_json(text):
    """["one", {"id": 2, "task": "two"}], in a dict or a fence too -> "- one\\n- two"; else text."""
    try:
        data = json.loads(re.sub("^json|`", "", text.strip(" \n`")))
        if isinstance(data, dict):  # the list in it, or else its values
            data = next((v for v in data.values() if isinstance(v, list)), list(data.values()))
        texts = [[v for v in (e.values() if isinstance(e, dict) else [e]) if isinstance(v, str)][0]
                 for e in data]
        return "\n".join("- " + one_line(text) for text in texts)
    except (ValueError, RecursionError, IndexError, TypeError):
        return text


# ---- STEP C2: write one program per sub-task ----
RULES = """Write one Python function that measures from the pixels how far this sub-task is done:

    def progress(images, first_image):

images: uint8 array (N, H, W, 3), N pictures in RGB. first_image: uint8 array (H, W, 3), the first
picture of the same episode. Return a float array (N,): 0 where nothing is done, 1 where the
sub-task is done, in between where a picture shows how far it has come. 0.95 or more means:
completed. Rules:
- Judge each picture alone and against first_image; nothing remembered, nothing from neighbours.
- H and W vary: measure in shares of the height and width, never in pixels.
- Pictures in which the things cannot be found (another scene) score 0: no NaN, no exception.
- The start must not score as completed. If a thing has to vanish, check that first_image shows it.
- Import only numpy (as np) and math. No classes, no files; do not write into the arrays.
- Work on the whole batch at once; where that is hard, define progress(image, first_image) instead.
Answer with one Python code block and nothing else."""


def write_program(ask, subtask, start_image, goal_image, goal, earlier=None, feedback=None):
    """Ask for the program of a sub-task -> source.

    earlier: the sub-tasks before it. feedback: (source, Report) of the program that failed.
    """
    parts = [f"The goal is {goal}.\nThis picture shows the start:", start_image,
             "This picture shows the goal reached:", goal_image]
    if earlier:
        parts.append("Done before this sub-task: " + "; ".join(earlier) + ".")
    parts.append(f"The sub-task: {subtask}\n\n{RULES}")
    if feedback:
        source, report = feedback
        parts.append(f"Your program so far:\n```python\n{source}```\nIt was tested and failed:\n- "
                     + "\n- ".join(report.reasons))
        for failure in report.failures[:6]:
            zoom = max(1, 256 // len(failure["image"]))  # enlarged for the VLM's eyes
            parts += [failure["caption"], failure["image"].repeat(zoom, 0).repeat(zoom, 1)]
        parts.append("Find the mistake, and answer with the whole corrected program.")
    return extract_code(ask(parts).text)


def extract_code(text):
    """The last fenced block that defines `progress`, or the bare text if that does."""
    text = answer_in(text)
    # ``` or ~~~, three or more, at the beginning of a line; the last may be missing
    fenced = r"^[ \t]*(```+|~~~+)[^\n`]*\n(.*?)(?:^[ \t]*\1|\Z)"
    blocks = [code for _, code in re.findall(fenced, text, re.DOTALL | re.MULTILINE)] or [text]
    blocks = [block for block in blocks if "def progress" in block]
    if not blocks:
        raise ProgramError("rejected", f"no code with def progress: {text[:100]!r}")
    return textwrap.dedent(blocks[-1]).strip() + "\n"


# ---- STEP C3: verify each program, and send failures back ----
CHECKS = {  # name: (share of its episodes that may fail it, what the VLM is told then)
    "hit_rate": (1 - HIT_RATE, "an expert does it and it is not called completed"),
    "false_rate": (FALSE_RATE, "random behaviour is called completed"),
    "backwards": (FALSE_RATE, "undone again (an expert backwards) it is called completed"),
    "frozen": (FALSE_RATE, "the start is called completed"),
    "other_task": (FALSE_RATE, "a picture of another task is called completed"),
    "too_soon": (FALSE_RATE, "it is called completed before it can be"),
    "regressions": (1 - HIT_RATE, f"progress falls back by more than {FALL_BACK}")}


@dataclasses.dataclass
class Report:
    """What C3 found out about one program."""

    subtask: str = ""
    round: int = 1
    verdict: str = "fail"
    reasons: list = dataclasses.field(default_factory=list)  # sentences for the VLM
    rates: dict = dataclasses.field(default_factory=dict)  # check: share of its episodes that fail
    failures: list = dataclasses.field(default_factory=list)  # dicts: check, caption, image (H,W,3)

    def judge(self, check, episodes, curves, frames):
        """Fill in a rate and, where it is too high, the reason and two pictures.

        Per episode: curves (T,), what the program said; frames: where that is wrong, or None.
        """
        limit, reason = CHECKS[check]
        wrong = [(i, t) for i, t in enumerate(frames) if t is not None]
        if not episodes:
            return
        rate = len(wrong) / len(episodes)
        self.rates[check] = 1 - rate if check == "hit_rate" else rate
        if rate > limit:
            self.reasons.append(f"{reason}, in {rate:.0%} of these episodes ({limit:.0%} may)")
            self.failures += [{"check": check, "image": episodes[i][t], "caption":
                               f"{reason}; in this picture it says {curves[i][t]:.2f}:"}
                              for i, t in wrong[:2]]


def stages(progress):
    """s(t): how many of the first K-1 sub-tasks were completed, in order, by frame t: (T,)"""
    done, out = 0, np.zeros(len(progress), int)
    for t, row in enumerate(progress):
        while done < len(row) - 1 and row[done] >= DONE:
            done += 1
        out[t] = done
    return out


def verify(program, expert_episodes, random_episodes, other_episodes=None, success=None,
           earlier=(), last=True):
    """Does the program call the sub-task completed where it is, and nowhere else? -> Report

    Of a random episode counts whether it is completed by the time the expert needs (for the last
    sub-task: at that frame); frames beside that are not looked at.

    Episodes: (T,H,W,3) uint8, the start picture first. success: per expert episode (T,) bool, the
    environment's sparse success, if it has one. earlier: programs of the sub-tasks before.
    An earlier sub-task is an event: completed by reaching DONE in any frame; then nobody looks.
    The last one is a state to stay in: completed if progress is at DONE in the last frame.
    """
    report, expert = Report(), expert_episodes
    if success is not None and [len(s) for s in success] != [len(e) for e in expert]:
        raise ValueError("success must have an array for each expert episode, a value per frame")
    success = [None] * len(expert) if success is None else [np.asarray(s, bool) for s in success]
    try:
        said = [program(e, e[0]) for e in expert]  # per episode (T,)
        done = [_completed(curve, last) for curve in said]
        missed = [(len(c) - 1 if last else int(c.argmax())) if t is None else None
                  for c, t in zip(said, done)]
        report.judge("hit_rate", expert, said, missed)
        for check, episodes, at_end in _negatives(
                expert, done, random_episodes, other_episodes, success, last):
            curves = [program(e, e[0]) for e in episodes]
            report.judge(check, episodes, curves, [_completed(curve, at_end) for curve in curves])
        before = [[p(e, e[0]) for p in earlier] for e in expert]
        faults = [_faults(np.stack([*b, curve], axis=1), last, s)
                  for b, curve, s in zip(before, said, success)]
        report.judge("too_soon", expert, said, [soon for soon, _ in faults])
        report.judge("regressions", expert, said, [fall for _, fall in faults])
        # Some pictures alone and together: chance, memory, and a look at neighbours show.
        some, first = expert[0][::max(1, len(said[0]) // 16)], expert[0][0]
        alone = np.concatenate([program(some[i:i + 1], first) for i in range(len(some))])
        if not np.allclose(program(some, first), alone, atol=1e-6):
            report.reasons.append("not deterministic: a picture's value changes when asked again")
    except ProgramError as error:
        report.reasons.append(f"the program fails: {error}")
    report.verdict = "fail" if report.reasons else "pass"
    return report


def _negatives(expert_episodes, done, random_episodes, other_episodes, success, last):
    """What must not complete the sub-task: (check, episodes, does only their end count?)"""
    # A start with the goal reached (a balanced pole) is no negative: "completed" is right there.
    away = [e for e, s in zip(expert_episodes, success) if not last or s is None or not s[0]]
    if not away or not random_episodes:
        raise CodeAsRewardError("C3 needs random episodes, and expert ones that start short of the"
                                " goal")
    # trap: in a long time chance does any easy sub-task: random gets the time the expert needs.
    needed = int(np.median([1 + t for t in done if t is not None] or [len(away[0])]))
    return [("false_rate", [e[:needed] for e in random_episodes], last),
            ("backwards", [e[::-1] for e in away], True),
            ("frozen", [e[:1] for e in away], True), ("other_task", other_episodes or [], last)]


def _completed(curve, at_end):
    """The frame that completes the sub-task, or None: the last one, if only that one counts."""
    reached = np.flatnonzero(curve >= DONE)
    if not len(reached) or at_end and reached[-1] < len(curve) - 1:
        return None
    return int(reached[-1] if at_end else reached[0])


def _faults(progress, last, success):
    """One expert episode -> (frame completed too soon or None, frame of a fall back or None)

    progress: (T, j+1) of the j earlier programs and this one. success: (T,) bool or None.
    """
    curve, earlier, soon = progress[:, -1], progress.shape[1] - 1, None
    ready = np.flatnonzero(stages(progress) == earlier)  # frames with all earlier ones completed
    if not len(ready):
        return None, None
    begin, end = int(ready[0]), len(curve)
    if earlier and curve[begin] >= DONE:  # by the very frame that completes the one before it
        soon = begin
    if last and success is not None:
        wrong = (curve >= DONE) & ~success
        soon = int(wrong.argmax()) if wrong.sum() > FALSE_RATE * np.sum(~success) else soon
    if not last and (curve[begin:] >= DONE).any():  # once completed, nobody looks
        end = begin + int((curve[begin:] >= DONE).argmax()) + 1
    drop = np.maximum.accumulate(curve[begin:end]) - curve[begin:end]
    return soon, begin + int(drop.argmax()) if drop.max() > FALL_BACK else None


def collect_episodes(env, expert, size, count=20, seed=0):
    """Play what `verify` needs -> dict(expert_episodes, random_episodes, success).

    env: Gymnasium's reset and step, picture(size), and info["success"]. Kept are expert episodes
    that succeed and random ones that do not.
    """
    space = env.action_space

    def play(policy, number, warm_up=0):
        """One episode of policy, or, for None, of chance -> images (T,H,W,3), success (T,)."""
        # a generator for each: what chance does in one does not depend on how long others were
        rng = np.random.default_rng([seed, number])

        def chance(obs):
            return int(rng.integers(space.n)) if hasattr(space, "n") else (
                rng.uniform(space.low, space.high).astype(np.float32))

        policy = policy or chance
        obs, info = env.reset(seed=seed + number)
        for _ in range(rng.integers(warm_up + 1)):
            obs, _, _, _, info = env.step(chance(obs))
        images, success, over = [env.image(size)], [info.get("success", 0)], False
        while not over:
            obs, _, terminated, truncated, info = env.step(policy(obs))
            images.append(env.image(size))
            success.append(info["success"])
            over = terminated or truncated
        return np.stack(images), np.array(success, bool)

    # trap: a pole that never leans verifies nothing. Where most starts are at the goal already, the
    # expert takes over after up to 20 random actions.
    at_goal = np.mean([env.reset(seed=seed + i)[1].get("success", 0) for i in range(count)])
    experts = (play(expert, i, 20 if at_goal > 0.5 else 0) for i in range(3 * count))
    randoms = (play(None, i) for i in range(3 * count))
    kept = list(itertools.islice((played for played in experts if played[1][-1]), count))
    if not kept:
        raise CodeAsRewardError("the expert never succeeds: nothing to verify programs on")
    failed = itertools.islice((images for images, success in randoms if not success[-1]), count)
    return {"expert_episodes": [images for images, _ in kept], "success": [s for _, s in kept],
            "random_episodes": list(failed)}


def learn_programs(ask, start_image, goal_image, goal, expert_episodes, random_episodes,
                   other_episodes=None, success=None, rounds=3, go_on=False, folder=None,
                   save_picture=None):
    """C1 to C3, up to `rounds` programs per sub-task -> (ProgramReward, list of every Report)

    go_on: leave out an earlier sub-task for which no program passes, instead of stopping; the last
    one, the goal, cannot be left out. folder: gets programs/*.py, verification.json, and failed/
    with each failed program and, by save_picture(path, image), the pictures on which it failed.
    """
    kept, programs, reports = [], [], []
    for name in ("programs", "failed") if folder else ():
        # trap: programs of an attempt that was cut short would join those of this one
        shutil.rmtree(Path(folder, name), ignore_errors=True)
    subtasks = describe_subtasks(ask, start_image, goal_image, goal)
    for k, subtask in enumerate(subtasks):
        last, feedback, asked = k == len(subtasks) - 1, None, []

        def ask_and_note(parts):
            asked.append(parts)
            return ask(parts)

        for number in range(1, rounds + 1):
            source = ""
            try:
                source = write_program(ask_and_note, subtask, start_image, goal_image, goal, kept,
                                       feedback)
                program = Program(source)
                report = verify(program, expert_episodes, random_episodes, other_episodes, success,
                                programs, last)
            except ProgramError as error:  # no code in the answer
                report = Report(reasons=[str(error)])
            report.subtask, report.round = subtask, number
            reports.append(report)
            if folder:
                _write_round(Path(folder), k, source, reports, save_picture)
            if report.verdict == "pass":
                kept.append(subtask)
                programs.append(program)
                break
            feedback = (source, report)
        else:
            if last or not go_on:
                raise CodeAsRewardError(f"no program for the sub-task {subtask!r} passed in "
                                        f"{rounds} rounds: {'; '.join(report.reasons)}", asked)
    if folder:
        Path(folder, "programs", "complete").touch()
    return ProgramReward(programs, kept), reports


def _write_round(folder, k, source, reports, save_picture):
    """For the run folder: the program, the reports so far, the pictures on which it failed."""
    report = reports[-1]
    name = f"{k + 1}_" + re.sub(r"[^a-z0-9]+", "_", report.subtask.lower()).strip("_")[:40]
    path = folder / "programs" / f"{name}.py"
    if report.verdict == "fail":
        path = folder / "failed" / f"{name}_round{report.round}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# sub-task: {report.subtask}\n{source}", encoding="utf-8", errors="replace")
    for i, failure in enumerate(report.failures if save_picture else []):
        save_picture(path.with_name(f"{path.stem}_{i}.png"), failure["image"])
    names = ("subtask", "round", "verdict", "reasons")
    rows = [{**{name: getattr(r, name) for name in names}, **r.rates} for r in reports]
    (folder / "verification.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def load_programs(folder):
    """The verified programs of a run folder, or of its folder `programs` -> ProgramReward.

    Each meets the allow-list again: a folder from elsewhere is as hostile as an answer.
    """
    paths = sorted([*Path(folder).glob("programs/[1-9]_*.py"), *Path(folder).glob("[1-9]_*.py")])
    if not paths:
        raise CodeAsRewardError(f"no programs (1_*.py, 2_*.py, ...) in {folder}")
    home = paths[0].parent
    if (home.parent / "verification.json").exists() and not (home / "complete").exists():
        raise CodeAsRewardError(f"the programs in {home} are not all: no program for some sub-task "
                                "passed, or the attempt was cut short")
    try:
        sources = [path.read_text(encoding="utf-8-sig") for path in paths]  # some editors sign
    except UnicodeDecodeError as error:
        raise CodeAsRewardError(f"a program in {home} is no UTF-8 text: {error}") from None
    first_lines = [source.partition("\n")[0] for source in sources]
    reward = ProgramReward(sources, [line.removeprefix("# sub-task: ") for line in first_lines])
    reward.progress(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    return reward


def verification_table(reports):
    """The reports as text, one line per round."""
    lines = ["  ".join(["round", "verdict", *CHECKS, "sub-task"])]
    for r in reports:
        cells = [f"{r.rates[name]:.0%}" if name in r.rates else "-" for name in CHECKS]
        cells = [cell.rjust(len(name)) for cell, name in zip(cells, CHECKS)]
        lines.append("  ".join([f"{r.round:5}", f"{r.verdict:7}", *cells, r.subtask]))
    return "\n".join(lines)


# ---- STEP C4: the share of sub-tasks done, minus one, is the reward ----
def potential(progress):
    """Phi(t) = (s(t) + p_s(t)) / K: (T,K) in [0,1] -> (T,).  One of two done, one halfway: 0.75"""
    s = stages(progress)
    return ((s + progress[np.arange(len(s)), s]) / progress.shape[1]).astype(np.float32)


class ProgramReward:
    """The verified programs, in order, as a reward. sources: list of program texts or Programs."""

    def __init__(self, sources, subtasks=None):
        if not sources:
            raise CodeAsRewardError("no programs, no reward")
        self.programs = [s if isinstance(s, Program) else Program(s) for s in sources]
        subtasks = subtasks or [f"sub-task {k + 1}" for k in range(len(sources))]
        self.subtasks = [one_line(text) for text in subtasks]
        self.failed_frames = 0  # on which a program failed after all; they score 0

    def progress(self, images, first_image):
        """(N,H,W,3), (H,W,3) -> (N,K): what each program says of each picture."""
        columns = [self._run(k, images, first_image) for k in range(len(self.programs))]
        return np.stack(columns, axis=1)

    def _run(self, k, images, first_image, end=None):
        program = self.programs[k]
        try:
            if end is None:
                program(images[:0], first_image)  # its process starts, on nobody's clock
                # trap: to halve what failed is 2 N calls; a slow program would take hours over it
                end = time.monotonic() + program.seconds * (1 + images.nbytes / BATCH_BYTES)
            return program(images, first_image)
        except ProgramError as error:
            late = end and time.monotonic() > end
            if late or error.kind not in ("error", "output") or not len(images):  # killed, refused
                raise CodeAsRewardError(
                    f"the program of {self.subtasks[k]!r}: {error}" + " - and it is too slow to try"
                    " which pictures are to blame" * bool(late)) from error
        if len(images) == 1:
            self.failed_frames += 1
            return np.zeros(1, np.float32)
        halves = np.array_split(images, 2)  # the pictures without the fault keep their value
        return np.concatenate([self._run(k, half, first_image, end) for half in halves])

    def episode_rewards(self, images, first_image, failed_end=False, discount=0.99,
                        differences=False, horizon=1000):
        """Phi - 1 of an episode: images (T,H,W,3) seen *after* each action, first_image -> (T,)

        differences: discount * Phi after - Phi before instead (Ng et al. 1999); see the header.
        failed_end: the environment ended it short of the goal (terminated without success). Where
        all rewards are negative an end is a relief: it costs what Phi = 0 forever would. With
        discount 1 that has no end: it costs the steps that were left until `horizon`.
        """
        frames = np.concatenate([first_image[None], images])  # done at the start is done
        phi = potential(self.progress(frames, first_image))  # (T+1,); starts afresh every time
        if differences:
            return discount * phi[1:] - phi[:-1]
        rewards = phi[1:] - 1
        left = max(0, horizon - len(images)) if discount == 1 else discount / (1 - discount)
        rewards[-1] -= left if failed_end else 0
        return rewards

    def predict(self, images):
        """(N,H,W,3) uint8 -> (N,) float32: the batch as one episode from its first image on."""
        return self.episode_rewards(images, images[0]) if len(images) else np.zeros(0, np.float32)

    def close(self, *unused):
        for program in self.programs:
            program.close()

    def __enter__(self):
        return self

    __exit__ = close


# ---- demo: a white bar has to be moved to the right edge of the picture ----
def _demo():
    code = "```python\ndef progress(images, first_image):\n    return {}\n```"
    answers = iter(["1. The white bar is at the right edge.",
                    code.format("images.max(axis=(1, 2, 3)) / 255"),  # wrong on purpose
                    code.format("np.clip(images.any(axis=(1, 3)).argmax(axis=1) / 52, 0, 1)")])
    ask, rng = lambda parts: types.SimpleNamespace(text=next(answers)), np.random.default_rng(0)

    def episode(columns):  # (T,) left edge of the bar -> (T,64,64,3) uint8
        inside = (np.arange(64) - columns.astype(int)[:, None]) // 8 == 0  # (T, 64)
        return np.uint8(255) * inside[:, None, :, None].repeat(64, 1).repeat(3, 3)

    expert = [episode(np.minimum(52, i + 4 * np.arange(20))) for i in range(10)]
    random = [episode(np.clip(rng.normal(0, 3, 20).cumsum(), 0, 52)) for _ in range(10)]
    reward, reports = learn_programs(ask, *expert[0][[0, -1]], "to move it right", expert, random)
    print("No VLM here, but three fixed answers; expect a program that fails and one that passes.")
    print(verification_table(reports), "Sent back:", *reports[0].reasons, sep="\n")
    print("Reward along an expert episode, expect -0.9 rising to 0:",
          reward.episode_rewards(expert[0][1:], expert[0][0]).round(1)[::2])
    print("Sandbox:", ", ".join(reward.programs[0].active))


if __name__ == "sandbox":
    _serve(Connection(int(sys.argv[3])))
elif __name__ == "__main__":
    _demo()
