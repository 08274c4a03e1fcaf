"""What the tests in this folder share: the way to the files that they test, and fixtures."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
torch.set_num_threads(1)  # as in test_components.py
# trap: no import of the project up here. test_witness.py runs in an environment without gymnasium.


@pytest.fixture(scope="module")
def env_of():
    """name -> an environment, made once; skips with the cure where OpenGL or a package is missing."""
    import envs

    made = {}

    def get(name):
        try:
            if name not in made:
                made[name] = envs.make(name)
                made[name].reset(seed=0)
                made[name].image(84)
        except (ValueError, ModuleNotFoundError) as error:
            pytest.skip(str(error))
        return made[name]

    yield get
    for env in made.values():
        env.close()


@pytest.fixture
def unreported(monkeypatch):
    """Leaves out report and pictures, which test_the_whole_algorithm_runs_every_step has, to save their seconds."""
    from support import report, run

    monkeypatch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
    monkeypatch.setattr(run.Run, "film", lambda *_: None)
    monkeypatch.setattr(run, "write_episodes", lambda *_: 0.0)
