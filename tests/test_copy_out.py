"""A component stands alone: no imports of the others, and its header's example runs in an empty folder."""
import ast
import itertools
import pathlib
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import code_as_reward

ROOT = Path(__file__).resolve().parents[1]


def test_score_reward_and_the_model_it_fits_can_be_copied_out_together(tmp_path):
    """The two files alone in a folder: the header's snippet must run."""
    for name in ("score_reward", "reward_model"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    subprocess.run([sys.executable, "-c", header_snippet("score_reward")], cwd=tmp_path, check=True, timeout=600)


def test_code_as_reward_stands_alone_and_its_snippet_runs(tmp_path):
    """The file alone in an empty folder: its header's snippet must run and print four times -1."""
    text = pathlib.Path(code_as_reward.__file__).read_text()
    (tmp_path / "code_as_reward.py").write_text(text)
    snippet = text.split("To use it elsewhere:\n")[1].split("\n\n")[0].split('\n"""')[0]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(snippet).replace("\\\\n", "\\n")], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.stdout.split() == ["[-1.", "-1.", "-1.", "-1.]"], run.stderr


COMPONENTS = ("sac", "reward_model", "vlm_query", "envs", "deformables", "gridworlds", "code_as_reward", "offline_vlm",
              "report", "cached_labels", "clip_reward")


def imported(path):
    """Names of all modules a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_component_imports_another(name):
    """A component must stand alone: the others reach it as arrays and callables only."""
    assert not imported(f"{name}.py") & ({*COMPONENTS, "train", "run"} - {name})


def header_snippet(name):
    """The indented Python block under "To use it elsewhere" in a file's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    after = docstring.split("To use it elsewhere", 1)[1].split("\n", 1)[1]
    lines = itertools.takewhile(lambda line: line.startswith("    ") or not line, after.splitlines())
    return "\n".join(line[4:] for line in lines)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_can_be_copied_out_alone(tmp_path, name):
    """Alone in an empty folder, a component must import and its header's snippet must run."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = subprocess.run([sys.executable, "-c", header_snippet(name)], cwd=tmp_path, capture_output=True, text=True,
                            timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
