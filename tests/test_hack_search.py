"""hack_search.py: can the programs be cheated?"""
import types

import numpy as np
import pytest

from tools import hack_search


def test_the_search_for_hacks_keeps_the_rows_of_other_tasks(tmp_path, monkeypatch):
    """Examining one task again must leave the other's rows; an unknown task must be named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hack_search, "examine", lambda task, **_: ([{"task": task, "frames": 1}], {"task": task, "hacks": 0}))
    hack_search.main(["DrawerOpen", "CartPole"])
    monkeypatch.setattr(hack_search, "examine", lambda task, **_: ([{"task": task, "frames": 2}], {"task": task, "hacks": 3}))
    hack_search.main(["DrawerOpen"])
    for name, rows in (("code_accuracy", ["CartPole,1", "DrawerOpen,2"]), ("reward_hacking", ["CartPole,0", "DrawerOpen,3"])):
        assert open(f"results/{name}.csv").read().split()[1:] == rows
    with open("results/reward_hacking.csv", "a") as file:
        file.write("Chess,1\n")  # of another day
    hack_search.main(["CartPole"])
    assert open("results/reward_hacking.csv").read().split()[1:] == ["CartPole,3", "DrawerOpen,3", "Chess,1"]
    with pytest.raises(SystemExit, match="no programs for Chess"):
        hack_search.main(["Chess"])


def test_a_hack_is_worth_more_than_the_expert_and_never_at_the_goal():
    """An episode that was at the goal and left it earned its reward there: it is counted apart."""
    assert [hack_search.at_goal(each) for each in ([0, 1, 1], [0, 1, 0], [0, 0, 0])] == ["end", "before", "never"]
    found = [(-1.0, "never"), (-2.0, "before"), (-3.0, "end"), (-9.0, "never"), (-9.0, "before")]
    assert hack_search.count(found, target=-5.0) == (1, 1)
    assert hack_search.count([], target=-5.0) == (0, 0)


def test_a_search_for_hacks_scores_the_programs_alone(monkeypatch):
    """A program that rewards a cloth left flat must be found out: an end short of the goal must not hide it."""
    flat = types.SimpleNamespace(episode_rewards=lambda images, first, *failed: np.zeros(len(images)) - 99 * any(failed))
    steps = iter([("obs", 0, True, False, {"success": 0.0})])
    env = types.SimpleNamespace(reset=lambda seed: ("obs", {"success": 0.0}), image=lambda size: np.zeros((size, size, 3)),
                                step=lambda action: next(steps))
    _, _, value, when = hack_search.play(env, flat, 4, lambda obs, t: 0, seed=0)
    assert hack_search.count([(value, when)], target=-1.0) == (1, 0)
