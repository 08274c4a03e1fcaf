"""A file stands alone: the core imports nothing of the project, nothing imports in a circle, headers' examples run."""
import ast
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tasks", "support", "tools")
CORE = ("sac", "reward_model", "vlm_query", "envs", "code_as_reward")
# file: what must lie beside it for its header's example, beyond numpy and the like
ALONE = {
    **{name: () for name in CORE},
    "tasks.deformables": (), "tasks.gridworlds": (), "tasks.metaworld": ("envs",), "tasks.schedules": (),
    "support.offline_vlm": (), "support.report": (), "support.cached_labels": (),
    "support.baselines": ("reward_model",), "support.fast": ("sac", "reward_model"),
}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (
    *ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")))
    if not path.stem.startswith(("test_", "__"))}


@functools.cache
def imported(name):
    """Names of the files of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(FILES)


@pytest.mark.parametrize("name", CORE)
def test_a_core_file_imports_nothing_of_the_project(name):
    """The others reach it as arrays and callables only."""
    assert imported(name) == set()


def test_only_train_wires_and_nothing_imports_in_a_circle():
    """Folders may import the top level, never the other way round but in train.py; following imports must end."""
    assert {name for name in FILES if "." not in name and imported(name)} == {"train"}
    for name in FILES:
        reached, new = set(), imported(name)
        while new:
            reached |= new
            new = set().union(*(imported(each) for each in new)) - reached
        assert name not in reached, f"{name} imports itself, by way of {sorted(reached)}"
        if name.split(".")[0] in ("tasks", "support"):
            assert not {each for each in reached if each.startswith("tools.") or each == "train"}, name


def header_snippet(name):
    """The indented Python block under "To use it elsewhere" in a file's docstring."""
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()))
    after = docstring.split("To use it elsewhere", 1)[1].split("\n", 1)[1]
    lines = itertools.takewhile(lambda line: line.startswith("    ") or not line, after.splitlines())
    return "\n".join(line[4:] for line in lines)


def run_example(name, folder, **more):
    """A header's example in a process of its own, in that folder -> subprocess.CompletedProcess."""
    # trap: on a busy machine, two threads of torch wait for each other most of the time. And no time limit: it would fail
    # there too.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", header_snippet(name)], cwd=folder, capture_output=True, text=True,
                          env={**environment, "OMP_NUM_THREADS": "1", **more})


@pytest.mark.parametrize("name", ALONE)
def test_a_file_can_be_copied_out_and_its_example_runs(tmp_path, name):
    """In a folder with nothing but what its header says it needs, it must import and its header's example must run."""
    for each in (name, *ALONE[name]):
        target = tmp_path / FILES[each].relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(FILES[each], target)
    result = run_example(name, tmp_path)
    if result.returncode and any(words in result.stderr for words in ("OpenGL", "No module named 'metaworld'",
                                                                     "No module named 'minigrid'")):
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr[-2000:]
    if name == "code_as_reward":  # four black images earn -1 each
        assert result.stdout.split() == ["[-1.", "-1.", "-1.", "-1.]"]


@pytest.mark.parametrize("name", sorted(name for name in FILES if "To use it elsewhere" in (
    ast.get_docstring(ast.parse(FILES[name].read_text())) or "") and name not in ALONE and name not in (
        "support.labeler", "support.run",  # their headers point elsewhere
        "tools.audit_vlm", "tools.hack_search", "tools.ablations")))  # minutes, and tested in files of their own
def test_the_example_of_a_file_that_stays_here_runs(tmp_path, name):
    """Beside the whole repository, a header's example must run from any folder."""
    result = run_example(name, tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
