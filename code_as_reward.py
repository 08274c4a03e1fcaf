"""VLM-CaR, Code as Reward: the VLM writes a program per sub-task; verified, they are the reward.

STEPs C1 to C4 replace STEPs 2 to 5: C1 describe the sub-tasks, C2 write a program for each, C3
verify it and send failures back, C4 pay
    reward of a picture = Phi - 1,   Phi = (s + p_s) / K  in [0, 1]   (train.py adds success)
s: sub-tasks completed so far, in order (progress p >= 0.95); p_s: progress in the current one. All
stay completed until the episode ends but the last, the goal: leaving it stops the pay.
Why not the potential difference Phi' - Phi? Its sum is Phi(end) - Phi(start): balancing earns no
more than ending upright. Phi - 1 pays most for arriving soon and staying.

Differs from the paper (its published code cannot run): 1. programs see (images, first image), keep
no state: no episode leaks into the next; 2. distinct sub-tasks in order count, not paid frames;
3. more negatives: backwards, frozen, another task, too soon; 4. failures go back as text and
pictures; 5. Phi - 1, for a bonus on every frame is earned by standing still.

Sandbox: allow-list over the syntax tree; curated builtins, numpy, math; own process without
environment, empty folder; limits on time, memory, files, processes; on Linux other user (if root),
no network, a system-call filter (x86-64, arm64). NOT covered: bugs of kernel, Python or numpy; one
busy core until the limit; network and system calls on macOS; Windows (refuses); whether a program
is *right*, which C3 judges on the episodes it was given.

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
import dataclasses
import json
import math
import os
import pathlib
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import weakref

import numpy as np

DONE = 0.95  # progress at which a sub-task counts as completed; asking for 1 would punish rounding
HIT_RATE = 0.95  # share of expert episodes that a program must see completed
FALSE_RATE = 0.10  # share of the negative episodes of a kind that it may wrongly see completed
FALL_BACK = 0.20  # how far progress may fall below its best while the expert works on the sub-task
MEMORY = 2 << 30  # bytes of address space of one program
BATCH_BYTES = 4 << 20  # pixels in one message: float64 copies of them are far from MEMORY
BATCH_SECONDS = 5.0  # wall clock for one message
CPU_SECONDS = 600  # of one process; at half of it a fresh one takes over


class CodeAsRewardError(Exception):
    """No reward can be made: the message names the sub-task and says what failed."""


class ProgramError(Exception):
    """A program failed. kind: rejected (by the allow-list), error, output, timeout or died."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


# ---- what a program may say: the allow-list over its syntax tree ----
NODES = set("""Module FunctionDef arguments arg Return Assign AugAssign AnnAssign For While If
    Expr Pass Break Continue BoolOp BinOp UnaryOp Lambda IfExp Dict Set ListComp SetComp DictComp
    GeneratorExp comprehension Compare Call keyword JoinedStr FormattedValue Constant Attribute
    Subscript Starred Name List Tuple Slice Import alias Try ExceptHandler Raise Assert With
    withitem NamedExpr""".split())
BUILTINS = set("""abs all any bool dict divmod enumerate filter float frozenset int isinstance
    len list map max min pow print range reversed round set slice sorted str sum tuple zip
    Exception ArithmeticError IndexError KeyError RuntimeError TypeError ValueError
    ZeroDivisionError""".split())
LINALG = set("norm det inv solve lstsq svd eigh".split())
# trap: numpy opens files (load, save, fromfile, memmap, ...), unpickles, and reaches raw memory
# (lib.stride_tricks, ctypeslib). A deny-list misses the next such function: so, an allow-list.
NUMPY = set("""abs absolute add all allclose any append apply_along_axis arange arccos arcsin
    arctan arctan2 argmax argmin argsort argwhere array array_equal array_split asarray
    atleast_1d atleast_2d average bincount bool_ broadcast_to ceil clip column_stack concatenate
    convolve copy corrcoef cos count_nonzero cov cross cumprod cumsum deg2rad degrees diag diff
    digitize divide dot einsum empty empty_like equal errstate exp expand_dims eye fabs
    flatnonzero flip fliplr flipud float16 float32 float64 floating floor full full_like gradient
    greater histogram hstack hypot indices inf int16 int32 int64 int8 integer interp intp isclose
    isfinite isin isinf isnan less linalg linspace log log10 log1p log2 logical_and logical_not
    logical_or logical_xor matmul max maximum mean median meshgrid mgrid min minimum mod moveaxis
    multiply nan nan_to_num nanargmax nanargmin nanmax nanmean nanmedian nanmin nanstd nansum
    ndarray negative newaxis nonzero ones ones_like outer pad percentile pi polyfit polyval power
    prod ptp quantile rad2deg radians ravel repeat reshape rint roll rot90 round searchsorted
    sign sin sort split sqrt square squeeze stack std subtract sum swapaxes take take_along_axis
    tan tanh tensordot tile transpose trapezoid tril triu uint16 uint32 uint64 uint8 unique
    unravel_index var vectorize vstack where zeros zeros_like""".split())
METHODS = set("""T all any argmax argmin argsort astype clip copy cumsum diagonal dot dtype fill
    flatten imag item itemsize max mean min nbytes ndim nonzero prod ravel real repeat reshape
    round shape size sort squeeze std sum swapaxes take tolist transpose var accumulate at reduce
    append extend insert pop remove reverse index count clear get items keys values update add
    union intersection difference join split strip lower upper startswith endswith""".split())
MATH = {name for name in dir(math) if not name.startswith("_")}


def check_source(source):
    """Raise ProgramError unless all of it is on the allow-list -> does it take whole batches?

    Runs in the sandbox only: even to parse a hostile text is a risk (nesting can crash Python).
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kind, why = type(node).__name__, None
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        operator = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
        if kind not in NODES and not isinstance(node, operator):
            why = f"{kind} is not allowed, only plain functions"
        elif hidden := [n for n in names if isinstance(n, str) and n[0] == "_" and n != "_"]:
            why = f"the name {hidden[0]} begins with an underscore"
        elif kind == "Name" and hasattr(builtins, node.id) and node.id not in BUILTINS:
            why = f"{node.id} is not available"
        # trap: "{0.__class__}".format(x) hides attributes from the tree: format is not allowed.
        elif kind == "Attribute" and node.attr not in NUMPY | LINALG | METHODS | MATH:
            why = f".{node.attr} is not available"
        elif kind == "Attribute" and not isinstance(node.ctx, ast.Load):
            why = f"assigning to .{node.attr} is not allowed"
        elif kind == "alias" and node.name not in ("numpy", "math"):
            why = f"import {node.name} is not allowed, only numpy and math"
        elif kind == "FunctionDef" and node.decorator_list:
            why = "decorators are not allowed"
        if why:
            raise ProgramError("rejected", f"line {getattr(node, 'lineno', 1)}: {why}")
    tops = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "progress"]
    arguments = [a.arg for a in tops[-1].args.args] if tops else []
    if arguments not in (["images", "first_image"], ["image", "first_image"]):
        raise ProgramError("rejected", "it must define progress(images, first_image) or"
                           " progress(image, first_image)")
    return arguments[0] == "images"


# ---- the inside of the sandbox: this part runs in the child process ----
BOOT = ("import sys, runpy; sys.path.append(sys.argv[2]);"
        "runpy.run_path(sys.argv[1], run_name='sandbox')")
SYSTEM_CALLS = {  # machine: (its audit number, what is left: read, write, memory, signals, exit)
    "x86_64": (0xC000003E, (0, 1, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 60, 131, 202, 228,
                            231, 318)),
    "aarch64": (0xC00000B7, (63, 64, 93, 94, 98, 113, 124, 132, 134, 135, 139, 214, 215, 216,
                             222, 226, 233, 278)),
}


def _filter_system_calls(libc):
    """seccomp: the kernel refuses every other call: no open, socket, fork, kill, sleep."""
    import ctypes
    audit, calls = SYSTEM_CALLS[os.uname().machine]
    load, jump_if_equal, back, refuse, allow = 0x20, 0x15, 0x06, 0x00050001, 0x7FFF0000
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, audit), (back, 0, 0, refuse), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    steps += [(back, 0, 0, refuse), (back, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    return libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _lock_down():
    """Give up all that reading pictures does not need -> names of the layers that hold."""
    import ctypes
    import resource
    active, libc, linux = [], ctypes.CDLL(None), sys.platform == "linux"
    # An empty network namespace; whoever is not root needs a user namespace of their own for it.
    if linux and libc.unshare(0x40000000 | (0x10000000 if os.getuid() else 0)) == 0:
        active.append("no-network")
    if os.getuid() == 0:
        try:
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
            active.append("other-user")
        except OSError:  # a container may forbid it; the layers below hold all the same
            pass
    # trap: a change of user clears the parent-death signal, so it has to come after setuid.
    if linux and libc.prctl(1, int(signal.SIGKILL), 0, 0, 0) == 0:
        active.append("dies-with-parent")
    if linux and libc.prctl(38, 1, 0, 0, 0) == 0:
        active.append("no-new-privileges")
    limits = dict(CPU=CPU_SECONDS, AS=MEMORY, FSIZE=0, NOFILE=8, NPROC=0, CORE=0)
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
            active.append("limit-" + name.lower())
        except (ValueError, OSError):  # macOS refuses some
            pass
    if linux and os.uname().machine in SYSTEM_CALLS and _filter_system_calls(libc):
        active.append("system-calls")
    return active


def _namespace():
    """All that a program finds: some builtins, and stand-ins for numpy and math."""
    def pick(module, names):
        return {name: getattr(module, name) for name in names if hasattr(module, name)}

    space = types.SimpleNamespace
    numpy = space(**{**pick(np, NUMPY), "linalg": space(**pick(np.linalg, LINALG))})
    modules = {"numpy": numpy, "math": space(**pick(math, MATH))}
    # trap: numpy's C code imports its own parts through the builtins of its caller.
    fetch = lambda name, *rest: modules.get(name) or builtins.__import__(name, *rest)
    safe = {**pick(builtins, BUILTINS), "__import__": fetch}
    return {"__builtins__": safe, "__name__": "program", "np": numpy, "math": modules["math"]}


def _answer(code, batch, images, first_image):
    """Run the program afresh: nothing it stored in the last batch survives -> (N,) float64"""
    space = _namespace()
    exec(code, space)
    if batch:
        out = space["progress"](images, first_image)
    else:
        out = [float(space["progress"](image, first_image)) for image in images]
    out = np.array(out, dtype=np.float64)
    if out.shape != (len(images),):
        raise ProgramError("output", f"{len(images)} images gave a result of shape {out.shape}")
    return out


def _describe(error):
    """The error as the VLM will read it: type, message, and the line of its program."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    named = isinstance(error, ProgramError)
    return (str(error) if named else f"error: {type(error).__name__}: {error}{line}")[:1000]


def _sandbox_main():
    """The child serves messages, both ways: two lengths (4 bytes each), JSON, raw bytes."""
    # trap: a program that prints would write into the protocol: pipes move, 0 to 2 become null.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    np.seterr(all="ignore")
    # trap: numpy loads parts of itself at first use (median: numpy.ma); soon no file can be read.
    import numpy.ma  # noqa: F401

    def send(payload=b"", **header):
        text = json.dumps(header).encode()
        sink.write(struct.pack("<II", len(text), len(payload)) + text + payload)
        sink.flush()

    send(active=_lock_down())
    code = batch = None
    while lengths := source.read(8):
        text, size = struct.unpack("<II", lengths)
        header, pixels = json.loads(source.read(text)), source.read(size)
        try:
            if "source" in header:
                batch = check_source(header["source"])
                code = compile(header["source"], "<program>", "exec")
                send()
            else:  # (1+N, H, W, 3), read-only: the first image, then the others
                images = np.frombuffer(pixels, np.uint8).reshape(header["shape"])
                send(_answer(code, batch, images[1:], images[0]).tobytes())
        except Exception as error:  # whatever goes wrong in a program is its verdict
            send(error=_describe(error))


# ---- the outside of the sandbox: one long-lived process per program ----
def _end(process, folder):
    """Kill the process group, and remove its folder."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended already
        pass
    process.wait()
    process.stdin.close(), process.stdout.close()
    folder.cleanup()


class Program:
    """program(images (N,H,W,3) uint8, first_image (H,W,3)) -> (N,) float32, or ProgramError.

    The process starts at the first call and stays; a batch that takes over `seconds` kills it.
    """

    def __init__(self, source, seconds=BATCH_SECONDS):
        if os.name != "posix":
            raise CodeAsRewardError("the sandbox needs Linux or macOS (on Windows: WSL)")
        self.source, self.seconds = source, seconds
        self.process, self.active, self.busy = None, [], 0.0  # active: layers that hold

    def __call__(self, images, first_image):
        images, first_image = np.asarray(images), np.asarray(first_image)
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != first_image.shape:
            raise ValueError(f"images must be (N,H,W,3) uint8, not {images.shape} {images.dtype}")
        if self.busy > CPU_SECONDS / 2:
            self.close()
        # trap: "dies with its parent" means the *thread* that started it; it may be gone by now.
        if self.process is None or self.process.poll() is not None:
            self._start()
        step = max(1, BATCH_BYTES // first_image.nbytes)
        parts = [self._batch(images[i:i + step], first_image) for i in range(0, len(images), step)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def _batch(self, images, first_image):
        pixels = [np.ascontiguousarray(part).data.cast("B") for part in (first_image, images)]
        header = {"shape": (1 + len(images), *first_image.shape)}
        out = np.frombuffer(self._exchange(header, pixels, 8 * len(images)), np.float64)  # (N,)
        bad = int((~np.isfinite(out)).sum()) + len(images) - len(out)
        if bad:
            raise ProgramError("output", f"NaN or infinity on {bad} of {len(images)} images")
        if out.min() < -1e-6 or out.max() > 1 + 1e-6:
            raise ProgramError("output", f"not in [0, 1]: {out.min():.3g} to {out.max():.3g}")
        return np.clip(out, 0, 1).astype(np.float32)

    def _start(self):
        self.close()
        folder = tempfile.TemporaryDirectory(prefix="program-")
        # -I: no environment, no user's packages; -S: no site hooks. numpy's place is handed over.
        command = [sys.executable, "-I", "-S", "-B", "-c", BOOT, os.path.abspath(__file__),
                   os.path.dirname(os.path.dirname(np.__file__))]
        # trap: BLAS threads count as processes, and keep a process from changing its namespace.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self.process = subprocess.Popen(
            command, env=dict.fromkeys(names, "1"), cwd=folder.name, bufsize=0,
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self._finalizer = weakref.finalize(self, _end, self.process, folder)
        os.set_blocking(self.process.stdin.fileno(), False)
        self.busy = 0.0
        hello, _ = self._receive(time.monotonic() + 60, 0)  # importing numpy on a busy machine
        self.active = hello.get("active", [])
        self._exchange({"source": self.source}, [], 0)

    def _exchange(self, header, payload, most):
        """Send one message, wait for the answer -> its raw bytes, at most `most`."""
        start, text = time.monotonic(), json.dumps(header).encode()
        lengths = struct.pack("<II", len(text), sum(len(piece) for piece in payload))
        for piece in (lengths + text, *payload):
            while piece:
                self._wait(self.process.stdin, select.POLLOUT, start + self.seconds)
                try:
                    piece = piece[os.write(self.process.stdin.fileno(), piece):]
                except BrokenPipeError:
                    self._fail("died", "the process ended while images were sent to it")
        header, raw = self._receive(start + self.seconds, most)
        self.busy += time.monotonic() - start
        if "error" in header:
            kind, _, message = str(header["error"]).partition(": ")
            raise ProgramError(kind if kind in ("rejected", "output") else "error", message)
        return raw

    def _receive(self, deadline, most):
        def exactly(size):
            data = bytearray()
            while len(data) < size:
                self._wait(self.process.stdout, select.POLLIN, deadline)
                piece = os.read(self.process.stdout.fileno(), size - len(data))
                if not piece:
                    self._fail("died", "the process ended without an answer (a limit, or a crash)")
                data += piece
            return bytes(data)

        text, size = struct.unpack("<II", exactly(8))
        if text > 10_000 or size > most:  # the child wrote these numbers: never trust them
            self._fail("output", "an answer that is too long")
        try:
            header = dict(json.loads(exactly(text)))
        except (ValueError, TypeError):
            self._fail("output", "an answer that is no JSON object")
        return header, exactly(size)

    def _wait(self, pipe, event, deadline):
        poll = select.poll()
        poll.register(pipe.fileno(), event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._fail("timeout", f"no answer within {self.seconds:g} s")

    def _fail(self, kind, message):
        self.close()
        raise ProgramError(kind, message)

    def close(self):
        if self.process is not None:
            self._finalizer()
            self.process = None


# ---- STEP C1: describe the sub-tasks ----
def describe_subtasks(ask, start_image, goal_image, goal):
    """Ask for the ordered sub-tasks that a picture can show -> list of 1 to 5 sentences."""
    answer = ask([
        f"The goal is {goal}.\nThis picture shows the start:", start_image,
        "This picture shows the goal reached:", goal_image,
        "List the sub-tasks on the way from the start to the goal, in the order in which they must"
        " be done. Name only sub-tasks whose completion can be seen in a single picture of this"
        " kind, held against the first picture of the episode. Use as few as possible and five"
        " at most; one is enough where no stage lies in between. The last is the goal itself.\n"
        "Answer with a numbered list, one short sentence per line, and nothing else."]).text
    found = re.findall(r"^\s*(?:\d+[.):]|[-*])\s+(.+?)\s*$", answer or "", re.MULTILINE)
    if not 1 <= len(found) <= 5:
        raise CodeAsRewardError(f"the VLM was asked for 1 to 5 sub-tasks and gave {len(found)}: "
                                f"{str(answer)[:200]!r}")
    return [line.replace("**", "") for line in found]


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
    text = text or ""
    blocks = re.findall(r"```[a-zA-Z]*[ \t]*\r?\n(.*?)```", text, re.DOTALL) or [text]
    blocks = [block for block in blocks if "def progress" in block]
    if not blocks:
        raise ProgramError("rejected", f"no code with def progress in the answer {text[:100]!r}")
    return blocks[-1].strip() + "\n"


# ---- STEP C3: verify each program, and send failures back ----
@dataclasses.dataclass
class Report:
    """What a program did: shares of episodes in [0, 1], None where nothing was tested."""

    subtask: str = ""
    round: int = 1
    hit_rate: float | None = None  # expert episodes completed, at least HIT_RATE
    false_rate: float | None = None  # random ones completed; this and the next four: <= FALSE_RATE
    backwards: float | None = None  # expert episodes that, played backwards, end completed
    frozen: float | None = None  # expert episodes completed in their first picture
    other_task: float | None = None  # episodes of another task completed
    too_soon: float | None = None  # expert episodes completed before they can be
    regressions: float | None = None  # expert episodes that fall back: at most 1 - HIT_RATE
    deterministic: bool = False
    finite: bool = False
    verdict: str = "fail"
    reasons: list = dataclasses.field(default_factory=list)
    failures: list = dataclasses.field(default_factory=list)  # dicts, see judge

    def judge(self, field, kind, episodes, curves, wrong, limit, reason):
        """Fill in one rate and, if it is above the limit, the reason and two pictures of it.

        curves: per episode (T,), what the program said. wrong: {episode: frame} of the fault.
        """
        rate = len(wrong) / max(1, len(episodes))
        setattr(self, field, rate if len(episodes) else None)
        if rate > limit:
            self.reasons.append(f"{reason}, in {rate:.0%} of these episodes ({limit:.0%} may)")
        for i, t in list(wrong.items())[:2] if rate > limit else []:
            caption = f"{reason}; in this picture it says {curves[i][t]:.2f}:"
            self.failures.append({"kind": kind, "episode": i, "frame": t, "caption": caption,
                                  "image": episodes[i][t]})

    def row(self):
        """For JSON: everything but the pictures."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        keep = ("kind", "episode", "frame", "caption")
        return {**row, "failures": [{k: f[k] for k in keep} for f in self.failures]}


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

    Episodes: (T,H,W,3) uint8, the start picture first. success: per expert episode (T,) bool, the
    environment's sparse success, if it has one. earlier: programs of the sub-tasks before.
    An earlier sub-task is an event: completed by reaching DONE in any frame; then nobody looks.
    The last one is a state to stay in: completed if progress is at DONE in the last frame.
    """
    report = Report()
    try:
        said = [program(e, e[0]) for e in expert_episodes]  # per episode (T,)
        tables = [np.stack([*(p(e, e[0]) for p in earlier), own], axis=1)  # (T, sub-tasks so far)
                  for e, own in zip(expert_episodes, said)]
        done = _completed(said, anywhere=not last)
        missed = {i: len(c) - 1 if last else int(np.argmax(c)) for i, c in enumerate(said)
                  if i not in done}
        report.judge("hit_rate", "expert", expert_episodes, said, missed, 1 - HIT_RATE,
                     "an expert does it and it is not called completed")
        report.hit_rate = len(done) / len(expert_episodes)
        for field, kind, episodes, anywhere, reason in _negatives(
                expert_episodes, said, random_episodes, other_episodes, success, last):
            curves = [program(e, e[0]) for e in episodes]
            wrong = _completed(curves, anywhere)
            report.judge(field, kind, episodes, curves, wrong, FALSE_RATE, reason)
        report.finite, report.deterministic = True, _deterministic(program, expert_episodes[0])
    except ProgramError as error:
        report.reasons.append(f"the program fails: {error}")
        return report
    faults = [_faults_along(table, last, None if success is None else np.asarray(success[i], bool))
              for i, table in enumerate(tables)]
    for column, (field, limit, reason) in enumerate((
            ("too_soon", FALSE_RATE, "it is called completed before it can be"),
            ("regressions", 1 - HIT_RATE, f"progress falls back by more than {FALL_BACK}"))):
        wrong = {i: fault[column] for i, fault in enumerate(faults) if fault[column] is not None}
        report.judge(field, "expert", expert_episodes, said, wrong, limit, reason)
    if not report.deterministic:
        report.reasons.append("a picture's value changes when asked again, or with its neighbours")
    report.verdict = "fail" if report.reasons else "pass"
    return report


def _completed(curves, anywhere):
    """{episode: frame} of the episodes that count as completed: by any frame, or by their last."""
    frames = [int(np.argmax(c)) if anywhere else len(c) - 1 for c in curves]
    return {i: t for i, (c, t) in enumerate(zip(curves, frames)) if c[t] >= DONE}


def _negatives(expert_episodes, said, random_episodes, other_episodes, success, last):
    """What must not complete: (Report's field, kind, episodes, anywhere, reason) of each kind."""
    # A start with the goal reached (a balanced pole) is no negative: "completed" is right there.
    away = [e for i, e in enumerate(expert_episodes)
            if not (last and success is not None and success[i][0])]
    if not away or not len(random_episodes):
        raise CodeAsRewardError("C3 needs random episodes, and expert ones that start short of the"
                                " goal")
    # trap: in a long time chance does any easy sub-task: random gets the time the expert needs.
    needs = [len(c) if last else 1 + int(np.argmax(c >= DONE))
             for c in said if last or c.max() >= DONE]
    needs = int(np.median(needs)) if needs else len(said[0])
    return [
        ("false_rate", "random", [e[:needs] for e in random_episodes], not last,
         "random behaviour is called completed"),
        ("backwards", "backwards", [e[::-1] for e in away], False,
         "undone again (an expert episode backwards) it is called completed"),
        ("frozen", "frozen", [e[:1] for e in away], False, "the start is called completed"),
        ("other_task", "other task", other_episodes or [], not last,
         "a picture of another task is called completed")]


def _faults_along(progress, last, success):
    """One expert episode -> (frame completed too soon or None, frame of a fall back or None)

    progress: (T, j+1) of the j earlier programs and this one. success: (T,) bool or None.
    """
    curve, earlier = progress[:, -1], progress.shape[1] - 1
    ready = np.flatnonzero(stages(progress) == earlier)  # frames with all earlier ones completed
    if not len(ready):
        return None, None
    begin = ready[0]
    reached = np.flatnonzero(curve[begin:] >= DONE)
    end = len(curve) if last or not len(reached) else begin + reached[0] + 1
    drop = np.maximum.accumulate(curve[begin:end]) - curve[begin:end]
    fall = int(begin + drop.argmax()) if drop.max() > FALL_BACK else None
    # Completed by the very frame that completes the one before: it is not a distinct sub-task.
    soon = int(begin) if earlier and curve[begin] >= DONE else None
    if last and success is not None:
        wrong = (curve >= DONE) & ~success
        soon = int(wrong.argmax()) if wrong.sum() > FALSE_RATE * (~success).sum() else soon
    return soon, fall


def _deterministic(program, episode):
    """Each picture twice, among others and alone: chance, memory, a look at neighbours show."""
    some = episode[:: max(1, len(episode) // 16)]
    alone = np.concatenate([program(some[i:i + 1], episode[0]) for i in range(len(some))])
    return np.allclose(program(some, episode[0]), alone, atol=1e-6)


def collect_episodes(env, expert, size, count=20, seed=0):
    """Play what `verify` needs -> dict(expert_episodes, random_episodes, success).

    env: Gymnasium's reset and step, picture(size), and info["success"]. Kept are expert episodes
    that succeed and random ones that do not. Where most starts are at the goal already, the expert
    takes over after up to 20 random actions: a pole that never leans verifies nothing.
    """
    rng, space = np.random.default_rng(seed), env.action_space

    def chance(obs):
        return int(rng.integers(space.n)) if hasattr(space, "n") else (
            rng.uniform(space.low, space.high).astype(np.float32))

    def play(policy, number, warm_up=0):
        obs, info = env.reset(seed=seed + number)
        for _ in range(rng.integers(warm_up + 1)):
            obs, _, _, _, info = env.step(chance(obs))
        images, success, over = [env.picture(size)], [info.get("success", 0)], False
        while not over:
            obs, _, terminated, truncated, info = env.step(policy(obs))
            images.append(env.picture(size)), success.append(info["success"])
            over = terminated or truncated
        return np.stack(images), np.array(success, bool)

    def keep(policy, ending, warm_up=0):
        kept = []
        for number in range(3 * count):
            images, success = play(policy, number, warm_up)
            kept += [(images, success)] if success[-1] == ending else []
            if len(kept) == count:
                break
        return kept

    at_goal = np.mean([env.reset(seed=seed + i)[1].get("success", 0) for i in range(count)])
    played = keep(expert, True, 20 if at_goal > 0.5 else 0)
    if not played:
        raise CodeAsRewardError("the expert never succeeds: nothing to verify programs on")
    return {"expert_episodes": [images for images, _ in played], "success": [s for _, s in played],
            "random_episodes": [images for images, _ in keep(chance, False)]}


def learn_programs(ask, start_image, goal_image, goal, expert_episodes, random_episodes,
                   other_episodes=None, success=None, rounds=3, go_on=False, folder=None,
                   save_picture=None):
    """C1 to C3, up to `rounds` programs per sub-task -> (ProgramReward, list of every Report)

    go_on: leave out an earlier sub-task for which no program passes, instead of stopping; the last
    one, the goal, cannot be left out. folder: gets programs/*.py, verification.json, and failed/
    with each failed program and, by save_picture(path, image), the pictures on which it failed.
    """
    kept, programs, reports = [], [], []
    subtasks = describe_subtasks(ask, start_image, goal_image, goal)
    for k, subtask in enumerate(subtasks):
        last, feedback = k == len(subtasks) - 1, None
        for number in range(1, rounds + 1):
            source, program = "", None
            try:
                source = write_program(ask, subtask, start_image, goal_image, goal, kept, feedback)
                program = Program(source)
                report = verify(program, expert_episodes, random_episodes, other_episodes, success,
                                programs, last)
            except ProgramError as error:
                report = Report(reasons=[f"the program fails: {error}"])
            report.subtask, report.round = subtask, number
            reports.append(report)
            if folder:
                _write_round(pathlib.Path(folder), k, source, reports, save_picture)
            if report.verdict == "pass":
                kept.append(subtask), programs.append(program)
                break
            feedback = (source, report)
            if program:
                program.close()
        else:
            if last or not go_on:
                for program in programs:
                    program.close()
                raise CodeAsRewardError(f"no program for the sub-task {subtask!r} passed in "
                                        f"{rounds} rounds: {'; '.join(report.reasons)}")
    return ProgramReward(programs, kept), reports


def _write_round(folder, k, source, reports, save_picture):
    """For the run folder: the program, the table, the pictures on which it failed."""
    report, passed = reports[-1], reports[-1].verdict == "pass"
    name = f"{k + 1}_" + re.sub(r"[^a-z0-9]+", "_", report.subtask.lower()).strip("_")[:40]
    kind = "programs" if passed else "failed"
    (folder / kind).mkdir(parents=True, exist_ok=True)
    stem = folder / kind / (name if passed else f"{name}_round{report.round}")
    text = f"# sub-task: {report.subtask}\n{source}"
    stem.with_suffix(".py").write_text(text, encoding="utf-8", errors="replace")
    for i, failure in enumerate(report.failures if save_picture else []):
        save_picture(stem.with_name(f"{stem.name}_{i}.png"), failure["image"])
    rows = json.dumps([r.row() for r in reports], indent=1)
    (folder / "verification.json").write_text(rows, encoding="utf-8")


def load_programs(folder):
    """The verified programs of a run folder, or of its folder `programs` -> ProgramReward.

    Each meets the allow-list again: a folder from elsewhere is as hostile as an answer.
    """
    folder = pathlib.Path(folder)
    folder = folder / "programs" if (folder / "programs").is_dir() else folder
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[1-9]_*.py"))]
    if not sources:
        raise CodeAsRewardError(f"no programs (1_*.py, 2_*.py, ...) in {folder}")
    first_lines = [source.partition("\n")[0] for source in sources]
    reward = ProgramReward(sources, [line.removeprefix("# sub-task: ") for line in first_lines])
    for program in reward.programs:
        try:
            program(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
        except ProgramError as error:
            reward.close()
            raise CodeAsRewardError(f"a program in {folder} is refused: {error}") from error
    return reward


def verification_table(reports):
    """The reports as text, one line per round."""
    names = "hit_rate false_rate backwards frozen other_task too_soon regressions".split()
    lines = ["round  verdict  " + "  ".join(names) + "  sub-task"]
    for r in reports:
        cells = [getattr(r, name) for name in names]
        texts = ["-" if cell is None else f"{cell:.0%}" for cell in cells]
        row = "  ".join(text.rjust(len(name)) for text, name in zip(texts, names))
        lines.append(f"{r.round:5}  {r.verdict:7}  {row}  {r.subtask}")
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
        self.subtasks = list(subtasks or [f"sub-task {k + 1}" for k in range(len(sources))])
        self.failed_frames = 0  # on which a program failed after all; they score 0

    def progress(self, images, first_image):
        """(N,H,W,3), (H,W,3) -> (N,K): what each program says of each picture."""
        columns = [self._run(k, images, first_image) for k in range(len(self.programs))]
        return np.stack(columns, axis=1)

    def phi(self, images, first_image):
        """One episode, images (T,H,W,3) seen *after* each action, first_image before -> (T,)"""
        frames = np.concatenate([first_image[None], images])  # done at the start is done
        return potential(self.progress(frames, first_image))[1:]

    def episode_rewards(self, images, first_image, failed_end=False, discount=0.99):
        """Phi - 1 for a whole episode, (T,H,W,3) -> (T,) float32. Every call starts afresh.

        failed_end: the environment ended it short of the goal (terminated without success). Where
        all rewards are negative an end is a relief: it costs what Phi = 0 forever would.
        """
        rewards = self.phi(images, first_image) - 1
        rewards[-1] -= discount / (1 - discount) if failed_end else 0
        return rewards

    def predict(self, images):
        """(N,H,W,3) uint8 -> (N,) float32: the batch as one episode from its first image on."""
        if not len(images):
            return np.zeros(0, np.float32)
        return potential(self.progress(images, images[0])) - 1

    def _run(self, k, images, first_image):
        try:
            return self.programs[k](images, first_image)
        except ProgramError as error:
            if error.kind not in ("error", "output"):  # killed or refused
                raise CodeAsRewardError(f"the program of {self.subtasks[k]!r}: {error}") from error
        if len(images) == 1:
            self.failed_frames += 1
            return np.zeros(1, np.float32)
        halves = np.array_split(images, 2)  # the pictures without the fault keep their value
        return np.concatenate([self._run(k, half, first_image) for half in halves])

    def close(self):
        for program in self.programs:
            program.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


# ---- demo: a white square has to be moved to the right edge of the picture ----
WRONG = """```python
def progress(images, first_image):
    return images.max(axis=(1, 2, 3)) / 255
```"""
RIGHT = """```python
import numpy as np
def progress(images, first_image):
    white = (images > 128).all(axis=3).any(axis=1)                    # (N, W): columns with white
    left = np.where(white.any(axis=1), white.argmax(axis=1), 0) / images.shape[2]
    return np.clip(left / 0.8, 0, 1)
```"""


def _square_episode(columns):
    """Pictures of a white square whose left edge is at these columns: (T,) -> (T,64,64,3) uint8"""
    images = np.zeros((len(columns), 64, 64, 3), np.uint8)
    for image, column in zip(images, columns):
        image[28:36, int(column):int(column) + 8] = 255
    return images


def _demo():
    answers = iter(["1. The white square is at the right edge.", WRONG, RIGHT])
    ask = lambda parts: types.SimpleNamespace(text=next(answers))
    rng = np.random.default_rng(0)
    expert = [_square_episode(np.minimum(52, i + 4 * np.arange(20))) for i in range(10)]
    random = [_square_episode(np.clip(rng.normal(0, 3, 20).cumsum(), 0, 52)) for _ in range(10)]
    print("No VLM here: a script with three fixed answers, its first program wrong on purpose.")
    reward, reports = learn_programs(ask, expert[0][0], expert[0][-1], "to move the square right",
                                     expert, random)
    with reward:
        print(verification_table(reports), "Sent back after round 1, with pictures:", sep="\n")
        print("  " + "\n  ".join(reports[0].reasons))
        rewards = reward.episode_rewards(expert[0][1:], expert[0][0])
        print("Reward along an expert episode, expect -0.9 rising to 0:",
              " ".join(f"{r:.1f}" for r in rewards))
        print("Sandbox:", ", ".join(reward.programs[0].active))
        start, frames = time.perf_counter(), np.zeros((4000, 100, 100, 3), np.uint8)
        reward.predict(frames)
        print(f"Expect 2,000 frames a second or more at 100 x 100 pixels, pipe included: "
              f"{len(frames) / (time.perf_counter() - start):,.0f}")


if __name__ == "sandbox":
    _sandbox_main()
elif __name__ == "__main__":
    _demo()
