"""The repository: README's code, the numbers in it and in results/README.md, and the rules of the house."""
import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import sweep

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT).with_suffix("")) for pattern in ("*.py", "tests/*.py")
                                         for path in ROOT.glob(pattern)))
def test_house_rules(name):
    """No bare except, debugger or leftover; no line over 120 characters; a header."""
    text = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(text)
    assert not any(isinstance(node, ast.ExceptHandler) and node.type is None for node in ast.walk(tree))
    assert not re.search(r"set_" + r"trace|breakpoint\(\)|\bTO" + r"DO\b|\bFIX" + r"ME\b", text)
    assert name.startswith("test") or max(map(len, text.splitlines())) <= 120
    assert ast.get_docstring(tree)


def table(path, first_column):
    """The rows of the Markdown table whose header begins with first_column -> list of lists of cells."""
    lines = iter((ROOT / path).read_text().splitlines())
    assert any(line.startswith(f"| {first_column} |") for line in lines), first_column
    next(lines)  # |---|
    return [[cell.strip("* ") for cell in line.strip("| ").split(" | ")]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]


def measured(name):
    """{(task, method, setting): rows of results/NAME.csv, a seed each}"""
    rows = {}
    for row in sorted(sweep.read_csv(ROOT / f"results/{name}.csv"), key=lambda row: int(row["seed"])):
        assert not row["error"]
        rows.setdefault((row["task"], row["method"], row["setting"]), []).append(row)
    return rows


def column(rows, name):
    return [round(float(row[name]), 2) for row in rows]


METHODS = {"stand-in": "preference", "oracle": "oracle", "(true reward)": "true", "(sparse reward)": "sparse",
           "score, stand-in": "score"}


def test_the_evidence_has_the_numbers_of_its_csv():
    """Each seed's success in the tables of results/README.md must be that of tasks.csv, few_questions.csv and weak_vlm.csv."""
    rows, seen = measured("tasks"), set()
    for task, labels, seeds, steps, pairs, _, end, third, *_ in table("results/README.md", "task | labels"):
        of = rows[task, METHODS[labels], METHODS[labels]]
        seen.add((task, METHODS[labels], METHODS[labels]))
        assert (int(seeds), steps) == (len(of), f"{int(of[0]['steps']):,}"), (task, labels)
        assert [float(x) for x in end.split(", ")] == column(of, "eval_success"), (task, labels)
        assert [float(x) for x in third.split(", ")] == column(of, "success_last_third"), (task, labels)
    assert seen == {key for key in rows if key[0] != "CartPole"}  # which has a table of its own
    rows = measured("few_questions")
    for pairs, *cells in table("results/README.md", "DrawerOpen (8,000 steps), pairs"):
        for (sampler, name), cell in zip(itertools.product(("uniform", "diverse"), ("eval_success", "success_last_third")),
                                         cells, strict=True):
            of = rows["DrawerOpen", "preference", f"{sampler} {pairs.replace(',', '')}"]
            assert [float(x) for x in cell.split(", ")] == column(of, name), (pairs, sampler, name)
    rows = measured("weak_vlm")
    for flaw, field, default, first in (("wrong", "vlm_mistakes", " patience=3", []), ("unsure", "vlm_unsure", "", ["labels"])):
        for share, *cells in table("results/README.md", f"{flaw} answers"):
            settings = [f"{field}={int(share[:-2]) / 100}{patience}" for patience in (default, " patience=0")]
            for (task, setting), cell in zip(itertools.product(("CartPole", "DrawerOpen"), settings), cells, strict=True):
                names = [*first, "eval_success", "spearman" if task == "CartPole" else "success_last_third"]
                for name, numbers in zip(names, cell.split("; "), strict=True):
                    of = column(rows[task, "preference", setting], name)
                    assert [float(x) for x in numbers.split(", ")] == of, (task, setting, name)


def test_the_readme_has_the_means_of_the_csv():
    """Its table of seven tasks must be the mean over the seeds of tasks.csv."""
    rows = measured("tasks")
    for task, seeds, steps, pairs, *cells in table("README.md", "task | seeds"):
        for method, cell in zip(METHODS.values(), cells, strict=True):
            of = rows[task, method, method]
            means = [sum(float(row[name]) for row in of) / len(of) for name in ("eval_success", "success_last_third")]
            assert np.allclose([float(x) for x in cell.split(" / ")], means, atol=0.00501), (task, method)
            assert (int(seeds), steps) == (len(of), f"{int(of[0]['steps']):,}"), (task, method)
        assert pairs.split()[0] == f"{int(rows[task, 'preference', 'preference'][0]['pairs_asked']):,}", task


def test_readme_python_blocks_run(tmp_path):
    """Every block marked python in the README must run as it stands, beside the repository's files."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                                env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
