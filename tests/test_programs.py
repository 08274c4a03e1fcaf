"""VLM-CaR against what VLMs, programs, threads and kills really do: lists, texts, the sandbox's process, --resume."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import subprocess
import threading
import time
import types

import numpy as np
import pytest

import code_as_reward
from code_as_reward import (CodeAsRewardError, Program, ProgramError, ProgramReward, describe_subtasks, extract_code,
                            learn_programs, load_programs, verification_table)
from support import given_rewards
from vlm_query import VLMError

BLACK = np.zeros((2, 16, 16, 3), np.uint8)
DEF = "def progress(images, first_image):\n    "
GRAY = DEF + "return images.mean(axis=(1, 2, 3)) / 255\n"
A, B = "The key has been picked up.", "The agent is on the green square."


def asked(text):
    """What the sub-tasks are where the VLM answers so."""
    return describe_subtasks(lambda parts: types.SimpleNamespace(text=text), BLACK[0], BLACK[0], "g")


NUMBERED = ("{}. ", "{}) ", "({}) ", "[{}] ", "{}: ", "{} - ", "{}.) ", "{} ", "{}.\t", "{}.", "#{}: ", "**{}.** ", "## {}. ",
            "> {}. ", "- {}. ", "Step {}: ", "**Step {}:** ", "- Step {}: ", "### Step {}\n\n", "Sub-task {} - ",
            "Subtask {} — ", "Sub task {}. ", "Task #{}: ", "Schritt {}: ", "Étape {} : ", "步骤{}：", "第{}步：", "{}、",
            "（{}）", "{}．", "{}단계: ")
SIGNS = ("-  -", "* *", "• •", "•\t•\t", "– –", "→ →", "+ +", "a. b.", "a) b)", "(a) (b)", "A. B.", "i. ii.", "(i) (ii)",
         "I. II.", "① ②", "⑴ ⑵", "1️⃣ 2️⃣", "١. ٢.", "१. २.", "一、 二、", "第一步： 第二步：", "0. 1.", "1. 1.", "Step_a: Step_b:")
LISTS = {
    **{mark: f"{mark.format(1)}{A}\n{mark.format(2)}{B}" for mark in NUMBERED},
    **{marks: "\n".join(f"{mark.replace('_', ' ')} {text}" for mark, text in zip(marks.split(), (A, B))) for marks in SIGNS},
    "boxes": f"- [ ] {A}\n- [ ] {B}", "bold": f"**1. {A}**\n**2. {B}**", "italic": f"*1. {A}*\n*2. {B}*",
    "nested": f"1. {A}\n   - it is gone\n2. {B}\n   - it is covered",
    "nested, not indented": f"1. {A}\n- it is gone\n2. {B}\n- it is covered",
    "nested numbers": f"1. {A}\n   1. it is gone\n   2. really\n2. {B}\n   1. it is covered",
    "nested letters": f"1. {A}\n   a. it is gone\n   b. really\n2. {B}", "nested tab": f"* {A}\n\t* it is gone\n* {B}\n\t* it is",
    "nested under a word": f"1. {A}\nEvidence:\n- it is gone\n2. {B}\nEvidence:\n- it is covered",
    "notes": f"1. {A}\n2. {B}\n\nNotes:\n- The door is yellow.", "bulleted notes": f"- {A}\n- {B}\n\nNotes:\n- The door.",
    "numbered notes": f"1. {A}\n2. {B}\n\n**Notes**\n1. The door is yellow.", "a note": f"1. {A}\n2. {B}\nNote: a door",
    "notes before": f"Observations:\n1. The door.\n2. The key.\n\nSub-tasks:\n1. {A}\n2. {B}",
    "a bullet before": f"- The door is yellow.\n\n1. {A}\n2. {B}",
    "explained": f"1. {A}\n   It is gone.\n\n2. {B}\n\nThat is all.", "bold, explained": f"**1. {A[:-1]}.**\nIt is gone.\n**2. {B}**",
    "words around": f"Sure! Here are the 2 sub-tasks:\n\n1. {A}\n\n2. {B}\n\nLet me know!",
    "headings between": f"## Start\n1. {A}\n## End\n2. {B}", "rules": f"---\n1. {A}\n2. {B}\n* * *", "fence": f"```\n1. {A}\n2. {B}\n```",
    "wrapped": "1. The key has\n   been picked up.\n2. The agent is on the\ngreen square.", "goal named": f"Step 1: {A}\nStep 2 (goal): {B}",
    "words": f"Sub-task 1: {A}\nFinal sub-task 2: {B}", "in one line": f"1. {A} 2. {B}", "empty": f"1. {A}\n2. {B}\n3.",
    "empty bullets": f"- {A}\n-\n- {B}\n- ", "twice": f"1. {B}\n2. {A}\n3. {B}", "quoted": f'1. "{A}"\n2. “{B}”',
    "end of turn": f"1. {A}\n2. {B}<|im_end|>", "CRLF": f"1. {A}\r\n2. {B}\r\n", "BOM": f"\ufeff1. {A}\n2. {B}",
    "colours": f"1. \x1b[1;31m{A}\x1b[0m\n2. \x1b]0;title\x07{B}\x07", "NUL and half an emoji": f"1. {A}\x00\n2. {B} \ud83d",
    "table": f"| # | Sub-task | Seen |\n|---|---|---|\n| **1** | {A} | yes |\n| 2. | {B} | no |",
    "JSON": f'```json\n["{A}",\n "{B}"]\n```', "JSON of dicts": f'{{"g": "x", "tasks": [{{"id": 1, "t": "{A}"}}, {{"id": 2, "t": "{B}"}}]}}',
    "stripped": f"1. {A}\n  2. {B}", "stripped, far": f"1) {A}\n    2) {B}\n\nNotes:\n1) The door.",
    "draft before": f"Draft:\n1. The door.\n2. The key.\n\nFinal answer:\n1. {A}\n2. {B}",
    "revised": f"1. The door.\n2. {B}\n\nWait, let me revise:\n1. {A}\n2. {B}", "bulleted draft": f"Draft:\n- The door.\n\nAnswer:\n- {A}\n- {B}",
    "images before": f"At the start:\n1. The door.\n\nIn the goal image:\n1. The key.\n\nThe list:\n1. {A}\n2. {B}",
    "explanation": f"### Sub-tasks\n1. {A}\n2. {B}\n### Explanation\n1. The door.\n2. The key.",
    "goal after": f"1. {A}\nGoal: {B}", "bold goal after": f"1. {A}\n\n**Goal:** {B}", "final after": f"- {A}\nFinal sub-task: {B}",
    "goal heading after": f"1. {A}\n\n## Goal\n\n{B}", "wrapped goal": f"1. {A}\n**Final goal**: The agent is on the\ngreen square.",
    "a goal for each": f"1. {A}\nGoal: the key\n2. {B}\nGoal: the square", "goal before": f"Goal: to win\n1. {A}\n2. {B}",
    "bold goal": f"- {A}\n**Goal: {B}**", "wrapped goal, blank": f"1. {A}\n\nGoal: The agent is on\nthe green square.",
    "emoji": f"🔑 {A}\n🚪 {B}", "long emoji": f"🗝️ {A}\n🧑‍🚀 {B}", "br": f"1. {A}<br>2. {B}", "br /": f"1. {A}<BR />- it is gone<br/>2. {B}",
    "table with br": f"| 1 | {A} | it is<br>gone |\n| 2 | {B} | x |",
    "JSON by number": f'{{"1": "{A}", "2": "{B}"}}',
}


def test_lists_of_sub_tasks_are_read_in_any_notation():
    """Each of a hundred ways to write the same two sub-tasks must give these two, cleaned and in order."""
    found = {name: LISTS[name] and tuple(code_as_reward.read_list(code_as_reward.answer_in(LISTS[name]))) for name in LISTS}
    found["twice"] = tuple(asked(LISTS["twice"]))
    assert len(LISTS) > 105 and {name: got for name, got in found.items() if got != (A, B)} == {}


@pytest.mark.parametrize("text", ["I would first pick up the key.", "", None, "1.", "- \n- ", "1. one\n3. three", "2. two",
                                  "I'm sorry: I can't.\nIdea: none", "In the end: it is done", "e.g. this", "---\n***", "{}", "[1]",
                                  "[" * 9000, "\n".join(f"{i}. x{i}" for i in range(1, 10)), "\n".join(["1. x"] * 6),
                                  "Draft:\n1. a x\n2. b x\n\nBetter:\n1. c x\n2. d x", "1. a x\n2. b x\n\nOr:\n1. c x",
                                  "- a x\n  - b x\n  - c x", "1. a x\n\nGoal:\n- b x", "1. a x\nGoal: b x\nGoal: c x"])
def test_an_answer_that_is_no_list_of_sub_tasks_stops_in_one_line(text):
    """Nothing may be guessed: none, several, too many, or an entry missing is one clear line that names its question."""
    with pytest.raises(CodeAsRewardError, match="1 to 5 sub-tasks") as raised:
        asked(text)
    assert "\n" not in str(raised.value) and len(raised.value.questions) == 1


def test_an_answer_without_end_is_read_at_once():
    """No pattern may go back and forth over a hundred thousand characters."""
    began = time.monotonic()
    for text in ("*" * 100_000, " " * 100_000 + "x", "| a " * 30_000, "1. a\n" + "b\n" * 5000, "(" * 100_000, "> " * 50_000,
                 "{" * 50_000, "a-" * 50_000, "1. x " + "2. y " * 3000, "```\n" * 3000):
        code_as_reward.read_list(text)
        with pytest.raises(ProgramError):
            extract_code(text)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("text", [f"~~~python\n{GRAY}~~~", f"```py\n{GRAY}```", f"``` python\n{GRAY}```", f"````\n{GRAY}````",
                                  f"  ```python title=x\n  {GRAY.replace(chr(10), chr(10) + '  ')}\n  ```", f"```python\n{GRAY}",
                                  f"```\nx = 1\n```\n```python\n{GRAY}```\n```\nprint(1)\n```", f"<think>```\n{DEF}pass\n```</think>{GRAY}",
                                  GRAY, "\ufeff" + GRAY, GRAY.replace("\n", "\r\n"), GRAY.replace("    ", "\t"), "\x00" + GRAY,
                                  GRAY + "# \ud83d \x1b[31m", GRAY.replace("    ", "\u00a0" * 4)])
def test_a_program_is_found_in_any_fence_and_cleaned(text):
    """Fences of all kinds, BOM, line ends, tabs, NUL, half characters: the program must run."""
    with ProgramReward([extract_code(text)]) as reward:
        assert reward.progress(BLACK + 255, BLACK[0]).tolist() == [[1], [1]]  # a program that fails says 0


def test_nothing_of_a_program_commands_the_terminal(tmp_path):
    """Its error, its sub-task, a stranger's file: one line each, without control characters."""
    for error in ('ValueError("\\x1b[2J\\x07a\\nb\\r\\ud83d\\x9b2J\\u202ec")', 'ValueError("\\x1b]0;x\\x07" * 9**7)',
                  'ValueError("\\U0001f600" * 999)'):
        with pytest.raises(ProgramError) as raised:
            Program(DEF + "raise " + error)(BLACK, BLACK[0])
        assert str(raised.value).isprintable() and raised.value.kind == "error"
        str(raised.value).encode()
    (tmp_path / "1_x.py").write_text("\ufeff# sub-task: \x1b[31mred\x1b[0m \x00 or not\n" + GRAY)
    with pytest.raises(CodeAsRewardError, match="null byte"):
        load_programs(tmp_path)
    (tmp_path / "1_x.py").write_text("\ufeff# sub-task: \x1b[31mred\x1b[0m or not\n" + GRAY)
    with load_programs(tmp_path) as reward:
        assert reward.subtasks == ["red or not"]


def learn(answers, folder=None, **more):
    """Sub-tasks and programs from fixed answers: a bar has to be moved from the left to the right."""
    bar = [np.repeat(np.uint8(np.arange(16) == x)[None, :, None], 16, 0).repeat(3, 2) * 255 for x in range(16)]
    expert, answers = np.stack(bar), iter(answers)
    return learn_programs(lambda parts: types.SimpleNamespace(text=next(answers)), bar[0], bar[-1], "g", [expert] * 4,
                          [expert[:4]] * 4, folder=folder, **more)


MOVED = f"```\n{DEF}return images.any(axis=(1, 3)).argmax(axis=1) / 15\n```"
HALF = MOVED.replace("return ", "return np.minimum(1, ").replace("/ 15", "/ 7)")
WRONG = f"```\n{DEF}return images[:, 0, 0, 0] * 0.0\n```"


def test_strange_sentences_become_files_that_load_again(tmp_path):
    """Half an emoji, NUL, colours in a sub-task: the table can be printed and the programs load."""
    learned, reports = learn([f"1. it \x00 is \x1b[31mright \ud83d", MOVED], tmp_path)
    learned.close()
    verification_table(reports).encode()
    assert "\x1b" not in verification_table(reports)
    with load_programs(tmp_path) as again:
        assert again.subtasks == ["it is right"] == learned.subtasks


def test_only_the_questions_of_the_sub_task_that_failed_are_to_be_forgotten(tmp_path):
    """Two programs of the goal failed: their questions, and not those of what passed before, come with the error."""
    with pytest.raises(CodeAsRewardError, match="'right'") as raised:
        learn(["1. half\n2. right", HALF, WRONG, WRONG], tmp_path, rounds=2)
    questions = [" ".join(part for part in parts if isinstance(part, str)) for parts in raised.value.questions]
    assert len(questions) == 2 and all("The sub-task: right" in text for text in questions)
    assert list(tmp_path.glob("failed/*.py"))
    learn(["1. right", MOVED], tmp_path)[0].close()  # a second attempt in the folder leaves nothing of the first
    assert not list(tmp_path.glob("failed/*")) and len(list(tmp_path.glob("programs/*.py"))) == 1


@pytest.mark.parametrize("ends, asked_before_failure", [(["complete"], 1), (["complete", "complete", "refused"], 3)])
def test_what_could_not_be_used_is_forgotten_by_the_cache(tmp_path, monkeypatch, ends, asked_before_failure):
    """train.py must forget the useless list, or the refused program, and nothing else."""
    answers = ["no list"] if len(ends) == 1 else ["1. half\n2. right", HALF, ""]
    questions, forgotten = [], []

    def ask(parts):
        questions.append(parts)
        return types.SimpleNamespace(text=answers[len(questions) - 1], end=ends[len(questions) - 1])

    bar = np.stack([np.repeat(np.uint8(np.arange(16) == x)[None, :, None], 16, 0).repeat(3, 2) * 255 for x in range(16)])
    monkeypatch.setattr(code_as_reward, "collect_episodes", lambda *_, **__: {
        "expert_episodes": [bar] * 4, "random_episodes": [bar[:4]] * 4, "success": None})
    import envs
    monkeypatch.setattr(envs, "rollout", lambda *_: (bar[:2],))
    monkeypatch.setattr(envs, "make", lambda *_: None)
    monkeypatch.setattr(envs, "expert", lambda *_: None)
    config = types.SimpleNamespace(labels="vlm", env="CartPole", seed=0, vlm_image_size=16, reward_image_size=16, goal="g", rounds=1,
                                   unverified="stop")
    vlm = types.SimpleNamespace(ask=ask, forget=forgotten.append, name="x/y")
    env = types.SimpleNamespace(reset=lambda seed: None, image=lambda size: bar[0])
    with pytest.raises((VLMError, CodeAsRewardError)):
        given_rewards.learn_programs(config, str(tmp_path), env, vlm, 0)
    assert len(questions) == asked_before_failure and len(forgotten) == 1 and forgotten[0] is questions[-1]


def test_a_program_survives_the_thread_that_used_it_first():
    """Of a thread that has just ended, or ends in the middle of another's call, the program must not die."""
    for _ in range(5):
        program = Program(GRAY)
        thread = threading.Thread(target=program, args=(BLACK, BLACK[0]))
        thread.start()
        thread.join()
        pid = program.process.pid
        time.sleep(0.05)
        assert program(BLACK, BLACK[0]).tolist() == [0, 0] and program.process.pid == pid
        program.close()


def test_threads_that_share_a_program_get_their_own_answers():
    """Eight threads at once: each must get the value of its own image."""
    program, right = Program(GRAY), []

    def work(value):
        images = np.full((2, 16, 16, 3), value, np.uint8)
        for _ in range(10):
            right.append(np.allclose(program(images, images[0]), value / 255))

    threads = [threading.Thread(target=work, args=(30 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    program.close()
    assert sum(right) == 80


def test_kill_9_leaves_no_folder_and_no_process(tmp_path):
    """The owner is killed: nothing in the temporary folder, and the programs' processes end too."""
    code = (f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\nimport numpy as np, code_as_reward\n"
            f"x = np.zeros((2, 16, 16, 3), np.uint8); p = code_as_reward.Program({GRAY!r}); p(x, x[0])\n"
            "print(p.process.pid, flush=True); time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    assert not list(tmp_path.iterdir())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the program's process lives on")


def test_a_set_of_words_has_the_same_order_in_every_process():
    """Else a resumed run has other numbers. In the child nothing is seen of our own hash seed."""
    source = DEF + ("for place, word in enumerate({'red', 'green', 'blue', 'yellow', 'purple', 'black'}):\n        if word == 'red':\n"
                    "            return np.full(len(images), place / 10)")
    values = set()
    for _ in range(5):
        with ProgramReward([source]) as reward:
            values.add(float(reward.progress(BLACK, BLACK[0])[0, 0]))
    assert len(values) == 1


def test_a_slow_program_that_fails_is_given_up_in_time():
    """The search for the images to blame must end when the time of the whole episode is over; a fast one's may not."""
    slow = Program(DEF + "for i in range(3_000_000):\n        pass\n    raise ValueError('no')", seconds=1.0)
    images, calls = np.zeros((64, 16, 16, 3), np.uint8), []
    batch = slow._batch
    slow._batch = lambda *args: calls.append(1) or batch(*args)
    with ProgramReward([slow], ["wait"]) as reward, pytest.raises(CodeAsRewardError, match="'wait'.*(too slow|timeout)"):
        reward.progress(images, images[0])
    assert len(calls) < 60  # of 127
    with ProgramReward([DEF + "raise ValueError('no')"]) as reward:
        assert not reward.progress(images, images[0]).any() and reward.failed_frames == 64


def test_a_fall_has_a_finite_price_where_the_discount_is_1():
    """It costs the steps that were left; below 1, what it always did."""
    with ProgramReward([GRAY]) as reward:
        price = [reward.episode_rewards(BLACK, BLACK[0], True, discount, horizon=50)[-1] for discount in (1, 1.0, 0.99)]
        assert price == pytest.approx([-49, -49, -100])
        assert np.isfinite(reward.episode_rewards(BLACK, BLACK[0], True, 1.0)).all()
        assert reward.episode_rewards(BLACK, BLACK[0], True, 1.0, horizon=2)[-1] == -1
        assert given_rewards.ProgramsReward(reward, 1, False, 50).of_images(BLACK, BLACK[0], True)[-1] == -49
