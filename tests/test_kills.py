"""Kill a run at random moments, go on with --resume: nothing paid for is asked twice, and the end is the same.

What this is: a test (`pytest tests/test_kills.py`, 3 kills) and the full proof
(`python -m tests.test_kills --kills 50`, which writes results/kills.csv). Which STEPs: 3, ask the VLM, and the
checkpoints around all of them.

A stand-in for a VLM, slow on purpose, serves in this process and writes down every request. `train.py` runs as a
process of its own, first undisturbed, then again: `kill -9` after a random time, `--resume`, and so on to the end.

What must hold, for every kill:
  1. An answer that was on disk (in the cache) when the process died is never asked for again.
  2. Answers that had been asked for and were not on disk: at most as many as there are workers. Only these repeat.
And at the end:
  3. metrics.csv equals that of the undisturbed run, byte for byte; labels.jsonl holds the same labels.
  4. Both runs asked the same questions, and the cache holds exactly these: so 1 and 2 compared the right things.

Moments are drawn uniformly from the first seconds after a process has said what it is going to do (one time in ten:
after its start): SPAN, or where that is longer the undisturbed run's time over the number of kills, so that the kills
spread over the run; only the first one of a run comes in the middle of its second session, where there is most to lose.
A run that ends before all kills are spent is followed by another one, with the next seed.

To use it elsewhere:
    import pathlib, tempfile
    from tests.test_kills import Witness, go, outcome
    with tempfile.TemporaryDirectory() as folder, Witness() as server:
        go(server, pathlib.Path(folder), dict(total_steps=200, horizon=50, eval_every=100, hidden=16, eval_episodes=1))
        print(outcome(pathlib.Path(folder))[0].decode(), len(server.asked), "requests")
"""
import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from support import offline_vlm

SPAN = 2.0  # seconds
WORKERS = 4
ROOT = Path(__file__).resolve().parents[1]
# Small networks and pictures: the time should go where it can be lost, into questions and checkpoints.
SETTINGS = dict(
    env="CartPole", horizon=50, seed_steps=100, explore_steps=100, feedback_every=100, pairs_per_session=4,
    batch_size=16, hidden=16, reward_image_size=48, vlm_image_size=100, reward_epochs=2, eval_every=250, eval_episodes=1,
    image_buffer=50, workers=WORKERS, vlm="local/" + offline_vlm.NAME,
)


# ---- STEP 3: ask the VLM which image is closer to the goal ----
class Witness(offline_vlm.OfflineVLM):
    """A slow stand-in that remembers every request, by the name under which its answer is kept: with Witness() as w."""

    def __init__(self, latency=0.3):
        super().__init__(latency=latency, mistakes=0.1, unsure=0.1)
        self.asked = []  # names of files in the cache, in the order of arrival

    def __enter__(self):
        self.url = self.start()
        return self

    def register(self, raw, path, headers):
        # Provider, URL and exact body. Were this not the client's own rule, claim 4 would fail.
        where = f"{SETTINGS['vlm']}\nhttp://{headers['Host']}{path}\n"
        if offline_vlm.SIGHT.encode() not in raw:  # asked at every start, and never kept
            with self.lock:
                self.asked.append(hashlib.sha256(where.encode() + raw).hexdigest() + ".json")
        return super().register(raw, path, headers)


# ---- one process, killed or not ----
def command(folder, settings, url):
    """The command that begins the run in folder/run, or goes on with it where that folder exists."""
    run = folder / "run"
    flags = {**SETTINGS, "vlm_url": url, **settings, "out": run}
    flags = {"resume": run} if run.exists() else flags
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return [sys.executable, str(ROOT / "train.py"), *words]


def go(server, folder, settings, wait=None, from_start=False, answers=0):
    """Run train.py; kill -9 it `wait` seconds after its first line (or after its start), but not before so many answers
    are on disk -> True if it was killed.
    """
    folder.mkdir(exist_ok=True)
    with open(folder / "stderr.txt", "w") as errors:
        process = subprocess.Popen(command(folder, settings, server.url), stdout=subprocess.PIPE, stderr=errors,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            if not from_start:
                process.stdout.readline()
            while len(on_disk(folder)) < answers and process.poll() is None:
                time.sleep(0.02)
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL: no handler, no clean-up, no flush
            return True
        finally:
            process.wait()
            process.stdout.close()
    said = (folder / "stderr.txt").read_text()[-2000:]
    assert process.returncode == 0 or "has finished" in said, said  # killed between its last file and its end
    return False


def on_disk(folder):
    """Names of the answers in the cache. What ends in .tmp was being written and is none."""
    return {path.name for path in (folder / "vlm_cache").glob("*.json")}


def outcome(folder):
    """What a run came to: the bytes of metrics.csv, and its labels by number (they arrive in any order)."""
    with open(folder / "run" / "labels.jsonl") as file:
        records = [json.loads(line) for line in file]
    return (folder / "run" / "metrics.csv").read_bytes(), sorted((r["index"], r["label"]) for r in records)


# ---- the proof ----
def kill_and_resume(server, folder, settings, kills, span, rng):
    """Run to the end with up to `kills` kills -> (kills, requests repeated because they were in flight)."""
    killed, repeated, saved = 0, 0, set()
    while True:
        began = len(server.asked)
        known = set(server.asked[:began])
        wait = float(rng.uniform(0, span)) if killed < kills else None
        from_start, answers = bool(rng.random() < 0.1), 0
        if not killed:
            # trap: a kill with no answer on disk, or none after the checkpoint, proves nothing of the cache; this one
            # comes in the middle of the second session
            wait, answers = 0, 3 * SETTINGS["pairs_per_session"]
        dead = go(server, folder, settings, wait, from_start, answers)
        asked = server.asked[began:]
        again = saved & set(asked)
        assert not again, f"{len(again)} answers were on disk at kill {killed} and were asked for again"
        repeated += len(known & set(asked))
        if not dead:
            return killed, repeated
        killed, saved = killed + 1, on_disk(folder)
        lost = set(server.asked) - saved
        assert len(lost) <= WORKERS, f"kill {killed}: {len(lost)} requests had no answer on disk"


def prove(folder, settings, kills, rng):
    """An undisturbed run, then one with kills -> a row of results/kills.csv."""
    started = time.time()
    with Witness() as server:
        go(server, folder / "whole", settings)
        # trap: two pairs can have the same notes, and their second questions, asked at once, the same body
        whole, requests = outcome(folder / "whole"), set(server.asked)
        server.asked.clear()
        span = max(SPAN, json.loads((folder / "whole" / "run" / "summary.json").read_text())["seconds"] / kills)
        killed, repeated = kill_and_resume(server, folder / "killed", settings, kills, span, rng)
        assert set(server.asked) == on_disk(folder / "killed") == requests
        metrics, labels = outcome(folder / "killed")
    assert labels == whole[1] and metrics == whole[0], f"the killed run in {folder} ends differently"
    return {"kills": killed, "steps": settings["total_steps"], "requests": len(requests),
            "repeated_in_flight": repeated, "identical_metrics": metrics == whole[0],
            "seconds": round(time.time() - started)}


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_three_times_asks_nothing_twice_and_ends_the_same(tmp_path, seed):
    """Three `kill -9` at random moments must cost no answer and change no byte of metrics.csv."""
    row = prove(tmp_path, dict(total_steps=600, seed=seed), 3, np.random.default_rng(seed))
    assert row["kills"] == 3 and row["requests"] > 30


def test_the_loop_of_a_given_reward_that_is_killed_ends_the_same(tmp_path):
    """The other loop of train.py asks nobody; a `kill -9` in its middle must change no byte of metrics.csv either."""
    settings = dict(total_steps=400, reward="true", seed=0, eval_every=100)
    with Witness() as server:
        go(server, tmp_path / "whole", settings)
        folder = tmp_path / "killed"
        folder.mkdir()
        process = subprocess.Popen(command(folder, settings, server.url), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (folder / "run" / "checkpoint" / "state.pt").exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -9, "it ended before it was killed"
        go(server, folder, settings)
        assert not server.asked
    whole, killed = ((tmp_path / name / "run" / "metrics.csv").read_bytes() for name in ("whole", "killed"))
    assert whole == killed and whole.count(b"\n") == 6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first run, and of the moments")
    parser.add_argument("--total-steps", type=int, default=3000, help="environment steps of a run")
    parser.add_argument("--out", default="results/kills.csv", help="the table")
    options = parser.parse_args()
    if options.kills < 1 or options.total_steps < 600:
        parser.error("--kills is 1 or more, --total-steps 600 or more: a shorter run has too few answers to lose")
    rng, rows = np.random.default_rng(options.seed), []
    call = (f"python -m tests.test_kills --kills {options.kills} "
            f"--seed {options.seed} --total-steps {options.total_steps}")
    while (left := options.kills - sum(row["kills"] for row in rows)) > 0:
        settings = dict(total_steps=options.total_steps, max_pairs=options.total_steps, seed=options.seed + len(rows))
        with tempfile.TemporaryDirectory() as folder:
            rows.append({**prove(Path(folder), settings, left, rng), "command": call})
        print(rows[-1], flush=True)
    os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    sums = {name: sum(row[name] for row in rows) for name in ("kills", "requests", "repeated_in_flight", "seconds")}
    print(f"{sums['kills']} kills in {len(rows)} runs, {sums['requests']} requests: no answer on disk was asked for "
          f"again, {sums['repeated_in_flight']} that were in flight were; metrics.csv as undisturbed, byte for byte. "
          f"{sums['seconds']} s. {options.out}")


if __name__ == "__main__":
    main()
