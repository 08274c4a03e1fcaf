"""Labels from elsewhere: pairs of images that somebody has compared already, so that nobody has to be asked again.

What this is: a reader of two kinds of files. A `labels.jsonl` of this project, with the images in `pairs/` beside it;
and the label files of the official RL-VLM-F repository, which publishes real answers of Gemini.

Which STEPs: it stands in for 2, pick pairs of images, and 3, ask the VLM which image is closer to the goal.

An official file is a pickle of one list of seven: images (N, H, 2 W, 3) uint8, the first image on the left half;
labels by true reward (N, 1); labels by the VLM (N, 1) in {0, 1, -1}; twice (state, action); twice the reward. Only the
images and the VLM's labels are used.

Differs from the paper's code:
  1. Its reader runs whatever a pickle names. Here a pickle can name arrays alone, and even these are rebuilt from their
     bytes by the few lines below: numpy's own unpickling code never sees the file.
  2. All files are read at once, into one data set; theirs replays one file per session of questions.
  3. Its public files hold the answers of one session in 25, so a data set made of them is small.

Shapes: first, second (M, H, W, 3) uint8 RGB, label (M,) int64: 0 the first is closer to the goal, 1 the second is.
Unsure, unreadable and unanswered pairs are left out. source: who gave the labels, in words, as far as the files say.

To use it elsewhere:
    import pickle, numpy as np
    from support.cached_labels import read_labels
    pairs, labels = np.zeros((2, 64, 128, 3), np.uint8), np.array([[1], [-1]])
    open("session.pkl", "wb").write(pickle.dumps([pairs, labels, labels, 0, 0, 0, 0]))
    first, second, label, source = read_labels("session.pkl", size=48)  # or a run's labels.jsonl, or a folder
"""
import argparse
import io
import json
import os
import pickle
import pickletools
import stat
import struct
import sys
import unicodedata

import imageio.v3 as iio
import numpy as np

LARGEST = 2048  # pixels; a wider image (of a pair: a half) is taken for a mistake or an attack
LARGEST_FILE = 2**31  # bytes of one pickle; the official ones have some ten million
LARGEST_LOG = 2**28  # bytes of a labels.jsonl; one of a thousand pairs has some five million
LARGEST_PAIR = 2**26  # bytes of the image of a pair, unpacked or not
MOST_OBJECTS = 10_000  # in one pickle; the official ones have some fifty
HASHING = ("DICT", "SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET")  # what looks at a key in a pickle
PNG = b"\x89PNG\r\n\x1a\n"
CODES = ("b1", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")  # numpy's, of plain numbers


class CachedLabelsError(ValueError):
    """These are not labels that can be used: one line, which file and why."""


# ---- a file that may be anything ----
def read_plain(path, most):
    """The bytes of an ordinary file. CachedLabelsError for a pipe, a device, a folder, or more than `most` bytes."""
    # trap: to open a pipe waits for ever, unless told not to; to read a device does not end
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise CachedLabelsError(f"{path}: no ordinary file")
        if about.st_size > most:
            raise CachedLabelsError(f"{path}: {about.st_size:,} bytes are too many (at most {most:,})")
        return file.read(most)


# ---- a pickle that can hold arrays and nothing else ----
class _DType:
    """What a pickle says of numpy.dtype: a code such as "u1", later the order of its bytes."""

    def __init__(self, code, *_):
        # trap: anything but a string is not even printed: a tuple of itself, twice, forty deep, takes for ever
        if not isinstance(code, str) or code not in CODES:
            code = code[:20] if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"it holds values of type {code!r}; only plain numbers are allowed")
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """What a pickle says of an array: it gets its content at once (_FromBuffer) or afterwards (__setstate__)."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.order + dtype.code).reshape(shape, order="F" if fortran else "C")


class _FromBuffer(_Array):  # trap: as a function, it could be given other defaults by the pickle
    def __init__(self, data, dtype, shape, order):
        self.__setstate__((1, shape, dtype, order == "F", data))


class _Scalar(_Array):
    def __init__(self, dtype, data):
        self.__setstate__((1, (), dtype, False, data))


class _Unpickler(pickle.Unpickler):
    """Every name that numpy 1 and 2 write for arrays, led to the stand-ins above; any other name is an error."""

    NAMES = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType}
    for _core in ("numpy.core", "numpy._core"):
        NAMES[_core + ".multiarray", "_reconstruct"] = _Array
        NAMES[_core + ".multiarray", "scalar"] = _Scalar
        NAMES[_core + ".numeric", "_frombuffer"] = _FromBuffer  # pickle protocol 5, which the official files use

    def find_class(self, module, name):
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module[:40]}.{name[:40]}, and only arrays are allowed")
        return self.NAMES[module, name]


def read_pickle(path):
    """One official file -> (images (N, H, 2 W, 3) uint8, VLM labels (N,)). CachedLabelsError if it is none."""
    content = io.BytesIO(read_plain(path, LARGEST_FILE))
    try:
        for opcode, value, _ in pickletools.genops(content):  # compares every length with the bytes that are there
            # trap: a forged length, or slot of its memory, makes pickle reserve that much before it looks any further
            if opcode.name.endswith("PUT") and int(value) > MOST_OBJECTS:
                raise pickle.UnpicklingError(f"it counts {value} objects")
            # trap: the hash of a tuple of itself, twice, thirty deep takes for ever
            if opcode.name in HASHING:
                raise pickle.UnpicklingError("it holds a dict or a set, and only arrays are allowed")
        content.seek(0)
        parts = _Unpickler(content).load()
        images, labels = parts[0].array, parts[2].array.reshape(-1)
    except Exception as error:  # bytes made up by somebody else may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CachedLabelsError(f"{path}: not a file of cached labels that can be used ({reason})") from None
    fits = images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] == 3 and len(images) == len(labels)
    if not fits or images.shape[2] % 2 or max(images.shape[1], images.shape[2] // 2) > LARGEST:
        raise CachedLabelsError(f"{path}: expected N labels and images (N, H, 2 W, 3) uint8 of at most {LARGEST} "
                                f"pixels a side, got {len(labels)} and {images.dtype} {images.shape}")
    return images, labels


# ---- our own log ----
def read_pair(path):
    """The image of a pair -> (H, 2 W, 3) uint8. Its size is read from its first bytes, before it is unpacked."""
    try:
        raw = read_plain(path, LARGEST_PAIR)
        head = raw[:24]
        # trap: a few kilobytes of PNG can unpack to gigabytes
        width, height = struct.unpack(">II", head[16:24]) if head[:8] == PNG else (0, 0)
        if max(height, width // 2) > LARGEST:
            raise CachedLabelsError(f"{path}: {width} x {height} pixels is too large (at most {LARGEST} a side)")
        image = iio.imread(raw, extension=".png", mode="RGB") if width else None
    except CachedLabelsError:
        raise
    except Exception as error:  # a decoder fed with arbitrary bytes may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CachedLabelsError(f"{path}: not an image that can be used ({reason})") from None
    if image is None or image.ndim != 3 or image.shape[1] % 2:
        raise CachedLabelsError(f"{path}: not a PNG of two images of one size side by side")
    return image


def read_log(path):
    """labels.jsonl -> [(path of the pair's image, 0 or 1)] of the pairs that got a label.

    Of a pair that was asked in both orders, the first order, if the answers agree.
    """
    *lines, _torn = read_plain(path, LARGEST_LOG).split(b"\n")  # a last line without its end was cut off by a crash
    labels, turned = [], {}  # (index, label); index of the first order -> label in the second one
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            index, label = record["index"], record["label"]
        except (ValueError, KeyError, TypeError, RecursionError):
            index = label = None
        # trap: True is an int, and a string could name any file of this machine
        if type(index) is not int or index < 0 or type(label) is not int:
            raise CachedLabelsError(f"{path}: line {number} is not a label record")
        if type(first := record.get("turns_round")) is int:
            turned[first] = label
        else:
            labels.append((index, label))
    return [(os.path.join(os.path.dirname(path), "pairs", f"{index:06d}.png"), label)
            for index, label in labels if label in (0, 1) and turned.get(index, 1 - label) == 1 - label]


def labeler_of(path):
    """Who gave the labels of a log: the run beside it says so."""
    try:
        name = str(json.loads(read_plain(os.path.join(os.path.dirname(path), "config.json"), 2**24))["labeler"])
        # trap: a stranger's words may hold escape codes for the terminal, or lines of their own
        return "".join(" " if unicodedata.category(c)[0] == "C" else c for c in name)[:200]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "somebody unknown"


# ---- in place of STEPs 2 and 3 ----
def read_labels(path, size=None):
    """Labelled pairs -> (first (M, H, W, 3) uint8, second, label (M,) in {0, 1}, source: who gave them).

    path: a labels.jsonl, a folder that has one, a pickle of the official repository, or a folder of these.
    size: the side all images get while they are read, so that large ones need not fit into memory together.
    """
    try:
        log = os.path.join(path, "labels.jsonl") if os.path.isdir(path) else path
        if os.path.lexists(log) and not log.endswith(".pkl") and not os.path.isdir(log):
            parts = ((read_pair(image)[None], np.array([label])) for image, label in read_log(log))
            source = f"{labeler_of(log)}, kept in {log}"
        else:
            names = sorted(name for name in os.listdir(path) if name.endswith(".pkl")) if os.path.isdir(path) else [""]
            parts = (read_pickle(os.path.join(path, name) if name else path) for name in names)
            source = f"cached labels of the official RL-VLM-F repository's format, kept in {path}"
        halves, kept = [], []
        for images, labels in parts:  # (N, H, 2 W, 3), (N,)
            good = np.isin(labels, (0, 1))  # the others, -1 among them, are no labels
            both = np.split(images[good], 2, axis=2)
            halves.append([half if size is None else resize(half, size) for half in both])
            kept.append(labels[good].astype(np.int64))
    except OSError as error:
        raise CachedLabelsError(f"{path}: cannot be read ({error.strerror})") from None
    if not sum(map(len, kept)):
        raise CachedLabelsError(f"{path}: there is no labels.jsonl and no .pkl with a label 0 or 1 in it")
    if len({half.shape[1:] for pair in halves for half in pair}) > 1:
        raise CachedLabelsError(f"{path}: the images differ in size; give the size they shall get")
    first, second = (np.concatenate(side) for side in zip(*halves))
    return first, second, np.concatenate(kept), source


def resize(images, size):
    """(N, H, W, 3) uint8 -> (N, size, size, 3): every new pixel is the mean of those it covers."""
    from PIL import Image  # comes with imageio

    if images.shape[1:3] == (size, size):
        return images
    small = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX)) for image in images]
    return np.stack(small) if small else np.zeros((0, size, size, 3), np.uint8)


# ---- python -m support.cached_labels PATH: what is in there? ----
def contact_sheet(first, second, label, count=12, size=150):
    """`count` pairs, spread over all, three in a row; the image that was preferred has a green frame."""
    tiles = []
    for i in np.unique(np.linspace(0, len(label) - 1, count).astype(int)):
        pair = [np.pad(resize(side[i : i + 1], size)[0], ((4, 4), (4, 4), (0, 0))) for side in (first, second)]
        chosen = np.pad(np.zeros((size, size), bool), 4, constant_values=True)  # the frame
        pair[label[i]][chosen] = (0, 170, 0)
        tiles.append(np.pad(np.hstack(pair), ((4, 4), (4, 4), (0, 0)), constant_values=255))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 3)
    return np.vstack([np.hstack(tiles[row : row + 3]) for row in range(0, len(tiles), 3)])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", help="a labels.jsonl, a run folder, or a folder of official .pkl files")
    parser.add_argument("--size", type=int, help="give all images this side, in pixels")
    parser.add_argument("--out", default="contact_labels.png", help="the contact sheet to write")
    options = parser.parse_args(arguments)
    if options.size is not None and options.size < 1:
        parser.error(f"--size {options.size}: it must be at least 1")
    try:
        first, second, label, source = read_labels(options.path, options.size)
    except CachedLabelsError as error:
        print(f"cached_labels.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(label)} labels by {source}: {(label == 0).sum()} prefer the first image, {label.sum()} the second; "
          f"images of {first.shape[2]} x {first.shape[1]} pixels")
    try:
        iio.imwrite(options.out, contact_sheet(first, second, label))
    except OSError as error:  # no such folder, no such kind of image
        print(f"cached_labels.py: {options.out}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return 2
    print(f"{options.out}: {min(12, len(label))} of them; the preferred image has a green frame")
    return 0


if __name__ == "__main__":
    sys.exit(main())
