"""cached_labels.py: answers kept by a run, and the official repository's pickles, hostile ones too."""
import json
import os
import pickle
import struct

import imageio.v3 as imageio
import numpy as np
import pytest

from support import cached_labels


def cached_file(path, labels=(0, 1, -1, 1), protocol=5, half=12):
    """A file as the official repository writes it: the left half of image i has brightness i, the right 100 + i."""
    left = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, half, half, 3), np.uint8)
    column, rest = np.array(labels, np.int64).reshape(-1, 1), np.zeros((len(labels), 1, 5))
    parts = [np.concatenate([left, left + 100], axis=2), 1 - column, column, rest, rest, rest[:, 0], rest[:, 0]]
    path.write_bytes(pickle.dumps(parts, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_official_cached_labels_are_read_and_unsure_ones_dropped(tmp_path, protocol):
    """The VLM's labels (not those by reward) must come with left half first, right half second, in order of files."""
    cached_file(tmp_path / "2024-01-02.pkl", (1,), protocol)
    cached_file(tmp_path / "2024-01-01.pkl", (0, 1, -1, 1), protocol)
    first, second, label, source = cached_labels.read_labels(str(tmp_path))
    assert label.tolist() == [0, 1, 1, 1] and "official" in source
    assert first[:, 0, 0, 0].tolist() == [0, 1, 3, 0] and second[:, 0, 0, 0].tolist() == [100, 101, 103, 100]
    assert first.shape == second.shape == (4, 12, 12, 3) and first.dtype == np.uint8


def test_pickles_of_numpy_1_and_2_and_of_any_memory_order_are_read(tmp_path):
    """numpy's modules were renamed in version 2; arrays may lie column by column: both must give the same images."""
    path = cached_file(tmp_path / "a.pkl", protocol=3)
    new, old = path.read_bytes(), path.read_bytes().replace(b"numpy._core", b"numpy.core")
    parts = pickle.loads(new)
    fortran = pickle.dumps([np.asfortranarray(parts[0]), None, parts[2].astype(">i4")], 5)
    for content in (old, fortran):
        path.write_bytes(new)
        expected = cached_labels.read_labels(str(path))
        path.write_bytes(content)
        assert all(np.array_equal(a, b) for a, b in zip(expected[:3], cached_labels.read_labels(str(path))[:3]))


class Attack:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


HOSTILE_FILES = {
    "a key that takes for ever to hash": lambda good: b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "a type that takes for ever to print": lambda good: b"\x80\x02cnumpy\ndtype\n)" + b"2\x86" * 60 + b"\x85R.",
    "other defaults for a function": lambda good: b"\x80\x02cnumpy._core.numeric\n_frombuffer\n"
                                                  b"N}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b.",
    "runs a command": lambda good: pickle.dumps([Attack()] * 7),
    "names a numpy function": lambda good: b"cnumpy\nload\n(S'x'\ntR.",
    "holds objects": lambda good: pickle.dumps([np.array([Attack()], dtype=object)] * 7),
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "garbage": lambda good: b"\x93\xff\x00garbage" * 100,
    "forged length": lambda good: b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "forged slot": lambda good: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "too few parts": lambda good: pickle.dumps([1, 2]),
    "float images": lambda good: pickle.dumps([np.zeros((2, 4, 8, 3)), 0, np.zeros((2, 1), int)]),
    "too few labels": lambda good: pickle.dumps([np.zeros((2, 4, 8, 3), np.uint8), 0, np.zeros((1, 1), int)]),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_pickles_end_in_one_clear_line(tmp_path, monkeypatch, kind):
    """A pickle that would run os.system, a broken or a forged one must be refused by name, and nothing be run."""
    monkeypatch.chdir(tmp_path)
    path = cached_file(tmp_path / "labels.pkl")
    path.write_bytes(HOSTILE_FILES[kind](path.read_bytes()))
    with pytest.raises(cached_labels.CachedLabelsError) as error:
        cached_labels.read_labels(str(path))
    assert "labels.pkl" in str(error.value) and "\n" not in str(error.value)
    reason = {"runs a command": "system, and only arrays are allowed", "forged slot": "it counts 2147483647 objects"}
    assert reason.get(kind, "") in str(error.value)
    assert not (tmp_path / "owned.txt").exists()


def small_log(folder, records, size=(10, 20)):
    """A run folder's labels.jsonl; image i has brightness i on the left half, 100 + i on the right."""
    (folder / "pairs").mkdir(exist_ok=True)
    for record in records:
        image = np.full((*size, 3), record["index"], np.uint8)
        image[:, size[1] // 2 :] += 100
        imageio.imwrite(folder / "pairs" / f"{record['index']:06d}.png", image)
    (folder / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"labeler": "offline stand-in (not a VLM)"}))
    return folder / "labels.jsonl"


def test_labels_of_a_run_are_read_with_their_images_and_their_labeler(tmp_path):
    """Labels 0 and 1 must come with the halves of their own image; a torn last line is dropped; who said so stays."""
    records = [{"index": i, "label": label} for i, label in ((3, 1), (0, 0), (1, -1), (2, -2))]
    log = small_log(tmp_path, records)
    with open(log, "a") as file:
        file.write('{"index": 4, "la')
    for path in (log, tmp_path):
        first, second, label, source = cached_labels.read_labels(str(path))
        assert label.tolist() == [1, 0] and first[:, 0, 0, 0].tolist() == [3, 0]
        assert second[:, 0, 0, 0].tolist() == [103, 100] and first.shape == (2, 10, 10, 3)
        assert "offline stand-in (not a VLM)" in source
    assert cached_labels.read_labels(str(log), size=5)[1].shape == (2, 5, 5, 3)


@pytest.mark.parametrize("line", [b"\x00\xff\xfe\x80", b"[1, 2]", b'{"index": "../../etc/passwd", "label": 1}',
                                  b'{"index": -1, "label": 1}', b'{"index": true, "label": 1}', b"[" * 100_000])
def test_a_label_log_with_garbage_ends_in_one_clear_line(tmp_path, line):
    """Whatever is no record of a label must be refused with the number of its line."""
    log = small_log(tmp_path, [{"index": 0, "label": 1}])
    log.write_bytes(log.read_bytes() + line + b"\n")
    with pytest.raises(cached_labels.CachedLabelsError, match="line 2 is not a label record"):
        cached_labels.read_labels(str(log))


def test_an_enormous_image_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """20,000 x 20,000 pixels must be refused from the header alone, and an image that is none in one line."""
    log = small_log(tmp_path, [{"index": 0, "label": 1}])
    pair = tmp_path / "pairs" / "000000.png"
    good = pair.read_bytes()
    monkeypatch.setattr(cached_labels.iio, "imread", lambda *_, **__: pytest.fail("it was unpacked"))
    pair.write_bytes(good[:16] + struct.pack(">II", 20_000, 20_000) + good[24:])
    with pytest.raises(cached_labels.CachedLabelsError, match="20000 x 20000 pixels is too large"):
        cached_labels.read_labels(str(log))
    monkeypatch.undo()
    for content in (good[:40], b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(30)):
        pair.write_bytes(content)
        with pytest.raises(cached_labels.CachedLabelsError, match="000000.png"):
            cached_labels.read_labels(str(log))


def test_resized_images_keep_their_means():
    """Every new pixel must be the mean of those it covers: a black and white check becomes grey."""
    check = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    assert cached_labels.resize(check, 8) is check
    assert np.abs(cached_labels.resize(check, 4).astype(int) - 127.5).max() < 1


def test_cached_labels_on_the_command_line(tmp_path, monkeypatch, capsys):
    """The demo must say how many labels of which kind, by whom, and draw them; a user's mistake is one line and a 2."""
    monkeypatch.chdir(tmp_path)
    small_log(tmp_path, [{"index": i, "label": i % 2} for i in range(5)])
    assert cached_labels.main(["."]) == 0
    said = capsys.readouterr().out
    assert "5 labels by offline stand-in (not a VLM)" in said and "3 prefer the first" in said
    assert imageio.imread("contact_labels.png").shape[2] == 3
    for wrong in (["nowhere"], [".", "--out", "no/such.png"], [".", "--out", "x.foo"]):
        assert cached_labels.main(wrong) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        cached_labels.main([".", "--size", "0"])
    assert "--size 0: it must be at least 1" in capsys.readouterr().err
