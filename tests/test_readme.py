"""The repository: README's commands and numbers, the rules of the house, and that the owner's packages are enough."""
import ast
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import settings
from tools import sweep

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT).with_suffix("")) for pattern in ("*.py", "*/*.py")
                                         for path in ROOT.glob(pattern)))
def test_house_rules(name):
    """No bare except, debugger or leftover; no line over 120 characters; a header."""
    text = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(text)
    assert not any(isinstance(node, ast.ExceptHandler) and node.type is None for node in ast.walk(tree))
    assert not re.search(r"set_" + r"trace|breakpoint\(\)|\bTO" + r"DO\b|\bFIX" + r"ME\b", text)
    assert "test" in name or max(map(len, text.splitlines()), default=0) <= 120
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


def test_the_table_of_what_is_held_is_that_of_its_csv():
    """Every seed's success, and how many are held, must be those of held*.csv and steady.csv."""
    rows = {"by hand": measured("held"), "by hand, at a constant rate": measured("held_constant_rate"),
            "the same, with the intercept": measured("held_intercept"),
            "the same, with the intercept and LayerNorm": measured("held_layer_norm"),
            "sac.py itself (`--fast 0`), at a constant rate": measured("held_autograd")}
    seen = set()
    for task, how, seeds, steps, pairs, held, end, third, drawn, _ in table("results/README.md", "task | SAC"):
        of = rows[how][task, "preference", "default"]
        seen.add((how, task))
        assert (int(seeds), steps, pairs) == (len(of), f"{int(of[0]['steps']):,}", of[0]["pairs_asked"])
        assert held == f"{sum(row['held'] == 'True' for row in of)} of {len(of)}"
        for cell, name in ((end, "eval_success"), (third, "success_last_third"), (drawn, "eval_success_drawn")):
            assert [float(x) for x in cell.split(", ")] == column(of, name), (task, name)
    assert seen == {(how, key[0]) for how, found in rows.items() for key in found}
    rows = measured("steady")
    for setting, seeds, *cells in table("results/README.md", "setting | seeds"):
        of = rows.pop(("DrawerOpen", "preference", setting))
        assert int(seeds) == len(of)
        for cell, name in zip(cells, ("eval_success", "success_last_third", "eval_success_drawn"), strict=True):
            assert [float(x) for x in cell.split(", ")] == column(of, name), (setting, name)
    assert not rows


def test_the_tables_of_judges_that_lean_are_those_of_their_csvs():
    """Every seed of judges.csv, and the means of remedies.csv, must stand in the tables."""
    rows = measured("judges")
    for judge, right, *cells, kept in table("results/README.md", "judge | labels right"):
        of = [rows.pop(("CartPole", "preference", f"{judge}, {remedy}")) for remedy in ("plain", "default", "both orders")]
        assert [float(x) for x in right.split(", ")] == column(of[0], "label_accuracy"), judge
        assert kept.split(", ") == [row["labels"] for row in of[2]], judge
        for cell, seeds in zip(cells, of, strict=True):
            end, spearman = cell.split("; ")
            assert [float(x) for x in end.split(", ")] == column(seeds, "eval_success"), judge
            assert [float(x) for x in spearman.split(", ")] == column(seeds, "spearman"), judge
    assert not rows
    fits = {}
    for row in sweep.read_csv(ROOT / "results/remedies.csv"):
        fits.setdefault((row["judge"], f"{int(row['asked_for']):,}", row["remedy"]), []).append(row)
    lines = table("results/README.md", "judge | calls")
    for judge, calls, right, *cells in lines:
        of = [fits[judge, calls, remedy] for remedy in ("plain", "intercept", "agree b", "both b")]
        assert float(right) == pytest.approx(np.mean([float(row["right"]) for row in of[0]]), abs=0.0051)
        means = [np.mean([abs(float(row[name])) for row in seeds]) for name in ("order", "best") for seeds in of]
        assert np.allclose([float(x) for x in cells], means, atol=[0.00051] * 4 + [0.051] * 4), (judge, calls)
    assert len(lines) >= 12 and all(len(seeds) >= 3 for seeds in fits.values())


def test_the_tables_of_drawer_judges_hints_and_foreign_tasks_are_those_of_their_csvs():
    """Every seed of judges_drawer.csv, hint.csv and not_built_in.csv must stand in the tables."""
    rows = measured("judges_drawer")
    for judge, *cells in table("results/README.md", "judge on DrawerOpen"):
        for remedy, cell in zip(("plain", "default", "both orders"), cells, strict=True):
            of = rows.pop(("DrawerOpen", "preference", f"{judge}, {remedy}"))
            for part, name in zip(cell.split("; "), ("eval_success", "success_last_third", "label_accuracy"), strict=True):
                assert [float(x) for x in part.split(", ")] == column(of, name), (judge, remedy, name)
    assert not rows
    rows = measured("hint")
    for task, reward, *cells in table("results/README.md", "task | reward"):
        of = rows.pop((task, reward, reward))
        for cell, name in zip(cells, ("eval_success", "success_last_third", "eval_success_drawn"), strict=True):
            assert [float(x) for x in cell.split(", ")] == column(of, name), (task, reward, name)
    assert not rows
    rows = measured("not_built_in")
    for task, seeds, steps, pairs, *cells, minutes in table("results/README.md", "environment | seeds"):
        of = rows.pop((task, "oracle", "oracle"))
        assert (int(seeds), steps, pairs) == (len(of), f"{int(of[0]['steps']):,}", f"{int(of[0]['pairs_asked']):,}")
        assert [float(x.replace(",", "")) for x in cells.pop().split("; ")] == [round(float(row["eval_return"])) for row in of]
        for cell, name in zip(cells, ("reward_accuracy", "eval_success", "success_last_third"), strict=True):
            assert cell == "not told" or [float(x) for x in cell.split(", ")] == column(of, name), (task, name)
    assert not rows


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


def commands(path):
    """The commands in a file's code blocks and between its backticks that begin with python -> lists of words."""
    text = (ROOT / path).read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if re.match(r"(\w+=\w+ )?python ", line)]
    lines += re.findall(r"`((?:\w+=\w+ )?python [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    words = [shlex.split(" ".join(line.split()), comments=True) for line in lines]
    return [each[next(i for i, word in enumerate(each) if "=" not in word):] for each in words]


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_every_command_is_one_that_is_understood(path):
    """train.py's flags must be known and have possible values; a tool must exist, and sweep's NAME and words too."""
    seen = 0
    for _, program, *arguments in commands(path):
        arguments = [{"IN,OUT": "1,2", "NAME": "tasks", "TASK": "CartPole", "NAME_openai": "x"}.get(word, word)
                     for word in arguments]
        seen += 1
        if program == "-m":
            module, *arguments = arguments
            if module == "tools.NAME":
                continue
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
            if module == "tools.sweep":
                its = sweep.parse([word for word in arguments if word != "..."])
                jobs = sweep.plan(its.sweep) if its.sweep else []
                sweep.only(jobs, [word for word in its.only or ()])
                sweep.plan_grid(its.grid) if its.grid else None
            elif module == "tools.audit_vlm":
                from tools import audit_vlm

                audit_vlm.parse_args(arguments)
        elif program == "train.py" and not {"--help", "--help-all", "FOLDER"} & set(arguments):
            settings.resolve(settings.parse_args(arguments))
        else:
            assert (ROOT / program).is_file(), program
    assert seen > 5


def test_every_link_into_the_repository_has_a_target():
    """Links and images of both READMEs must lead to a file that is there, and to a heading that is there."""
    for path in ("README.md", "results/README.md"):
        text = (ROOT / path).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text.replace("]\n(", "](")) + re.findall(r'src="([^"]+)"', text):
            if re.match(r"\w+:", target):
                continue
            file, _, heading = target.partition("#")
            file = (ROOT / path).parent / file if file else ROOT / path
            assert file.exists(), (path, target)
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if heading else []
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not heading or heading in slugs, (path, target, slugs)


def test_readme_python_blocks_run(tmp_path):
    """Every block marked python in the README must run as it stands, beside the repository's files."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                                env=environment)
        assert result.returncode == 0, result.stderr[-2000:]


# ---- the owner's packages are enough ----
OWNERS = ("torch", "numpy", "gymnasium", "requests", "imageio", "tqdm")
BLOCK = """import importlib.machinery, sys
class NotThere(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {!r} else super().find_spec(name, path, target)
sys.meta_path = [NotThere if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""


def with_what_they_bring(names):
    """Names of packages -> these and all that they need, as pip would install them (of extras: gymnasium's mujoco)."""
    found, new = set(), set(names)
    while new:
        name = new.pop()
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        for line in needed:
            extra = re.search(r"extra *== *['\"]([\w-]+)", line)
            if not extra or (name, extra[1]) == ("gymnasium", "mujoco"):
                new |= {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()} - found
    return found


def test_the_owners_packages_are_enough_from_start_to_report(tmp_path):
    """With no other package than OWNERS and what they bring, a whole run must end with its report: tables, no charts."""
    allowed = with_what_they_bring(OWNERS)
    modules = importlib.metadata.packages_distributions()
    missing = {module for module, packages in modules.items()
               if not {re.sub(r"[-_.]+", "-", name).lower() for name in packages} & allowed}
    missing |= {"scipy", "matplotlib", "metaworld", "minigrid", "pandas", "pytest"}
    assert not missing & {"torch", "numpy", "gymnasium", "mujoco", "requests", "urllib3", "imageio", "PIL", "tqdm"}
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(sorted(missing)))  # Python imports this by itself
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def python(*words):
        return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert "No module named 'scipy'" in python("-c", "import scipy").stderr
    done = python("train.py", "--env", "CartPole", "--out", tmp_path / "run", "--total-steps", 300, "--seed-steps", 100,
                  "--explore-steps", 100, "--feedback-every", 100, "--pairs-per-session", 6, "--max-pairs", 12,
                  "--batch-size", 16, "--hidden", 16, "--reward-epochs", 2, "--eval-every", 150, "--eval-episodes", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["finished"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "pip install matplotlib" in page and "<b>Return of the evaluation episodes</b>" in page and "image/svg" not in page


def test_requirements_name_the_owners_packages_first():
    """One file in two parts: the first must hold the owner's packages and nothing but what they bring; all are pinned."""
    first, second = (ROOT / "requirements.txt").read_text().split("# ---- Part 2")
    names = [[re.split(r"[\[=;]", line)[0] for line in part.splitlines() if "==" in line and line[0].isalpha()]
             for part in (first, second)]
    assert set(OWNERS) <= set(names[0]) <= with_what_they_bring(OWNERS)
    assert not set(names[0]) & set(names[1]) and {"metaworld", "minigrid", "matplotlib", "scipy", "pytest"} <= set(names[1])
    lines = [line for line in (first + second).splitlines() if line and line[0].isalpha()]
    assert all(re.match(r'[\w-]+(\[\w+\])?==[\d.]+(; python_version [<>]=? "3.11")? *(#.*)?$', line) for line in lines)
