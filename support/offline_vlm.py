"""A stand-in for a vision-language model (VLM): a real HTTP server, but no VLM.

It lets everything run without a key, a network or a GPU. On loopback it speaks the wire formats of
OpenAI (chat completions), Gemini (generateContent) and Anthropic (messages), decodes the images
it was sent, measures them with a few lines of numpy per goal (READERS), says in words what it
measured, and decides from the words: the two stages of STEP 3. It never sees the simulator, and
knows the goals of the built-in tasks only, where a line or a sentence ends in one; any other is an
HTTP 400 that names them. Its answers and its model name say that it is no VLM.

What it does with a question, by what is in it:
  two images                  describe both; decide as well if the text asks for 0, 1 or -1
  notes on two, no image      decide from the numbers in the words
  one image, notes on one     the same with a score from 0 to 1
  code_as_reward.py's prompts  the sub-tasks, or a program (a mistake is put right when told)
Where the images differ by less than the reader's margin it answers -1.

Mistakes and unsure answers are drawn from a hash of (seed, goal, images in their order): neither
threads nor history matter. A mistaken description has its two images exchanged, so both stages
tell the same lie. With a judge of support/judges.py the errors are such as VLMs make: the judge's
label comes first, and the description is made to fit it, so here too both stages agree.
Faults are drawn from a hash of (seed, request, how often it was seen), so asking again succeeds.
Shapes: a reader maps (H, W, 3) uint8 to a float, nan if it sees nothing.

To use it elsewhere (point any client at url, as if it were OpenAI's):
    import json, urllib.request
    from support.offline_vlm import SIGHT, OfflineVLM
    body = json.dumps({"messages": [{"content": f"The goal is {SIGHT}"}]}).encode()
    with OfflineVLM(latency=0.1) as url:
        print(urllib.request.urlopen(url + "/chat/completions", body).read())
"""
import argparse
import base64
import contextlib
import hashlib
import inspect
import json
import re
import threading
from collections import Counter, namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio.v3 as iio
import numpy as np

NAME = "offline-stand-in-not-a-VLM"
SAYS = "(offline stand-in, not a VLM)"
SIGHT = "to make the picture as bright as possible"  # what a client's sight check asks about


# ---- what it can see: one reader per goal, each a self-contained function on numpy arrays ----

def read_brightness(image):
    """(H, W, 3) uint8 -> mean brightness, 0 to 255."""
    return float(image.mean())


def read_pole(image):
    """(H, W, 3) uint8 -> angle of the brown pole in degrees, 0 upright, positive leans right."""
    pixels = image.astype(np.float64)
    # Brown has more red than blue; the share of brown in a pixel is its weight.
    brown = np.clip((pixels[..., 0] - pixels[..., 2]) / 110.0, 0.0, 1.0)  # (H, W)
    brown[brown < 0.08] = 0.0  # the noise of a JPEG
    amount = brown.sum(axis=1)  # (H,) how wide the pole is in each row
    if (amount > 0.5).sum() < 5:
        return float("nan")
    rows = np.flatnonzero(amount > 0.6 * np.median(amount[amount > 0.5]))
    if len(rows) < 6:
        return float("nan")
    cut = max(1, len(rows) // 8)  # the slanted tip and the cart's cut are off the middle
    rows = rows[cut:-cut]
    middle = (brown[rows] * np.arange(brown.shape[1])).sum(axis=1) / amount[rows]  # (rows,)
    off = rows - rows.mean()
    slope = (off * middle).sum() / (off**2).sum()  # columns per row, rows counted downwards
    return float(-np.degrees(np.arctan(slope)))


def read_drawer(image):
    """(H, W, 3) uint8 -> how far the drawer is open, percent; above 100 if pulled past the stop.

    The white handle is the only grey thing below the wall; it slides down and right as it opens.
    """
    pixels = image.astype(np.float64)
    height, width = pixels.shape[:2]
    bright, dark = pixels.max(axis=2), pixels.min(axis=2)
    handle = (bright > 140) & (bright - dark < 30)
    handle[:height // 3] = False  # the wall, and the floor behind it
    if handle.sum() < 0.002 * height * width:
        return float("nan")
    rows, columns = np.nonzero(handle)
    along = 0.8 * (columns.mean() + 0.5) / width + 0.6 * (rows.mean() + 0.5) / height
    # Image widths at even steps of the way: they look larger as they come nearer.
    places = [0.5700, 0.6128, 0.6550, 0.6988, 0.7456, 0.7956, 0.8480, 0.9040, 0.9645, 1.0284]
    return float(np.interp(along, places, np.linspace(-15.6, 125.0, 10)).clip(0, 125))


def read_ball(image):
    """(H, W, 3) uint8 -> distance of the ball from the middle of the goal, in ball widths.

    The ball's black patches say where it is in the image; from there a ray goes to the level of
    its centre on the table, 2.6 cm up, or as far as a ball that looks so large is away, if that is
    clearly another level: the arm lifts it, or presses it down. (Not where it seems to be in the
    goal.) The camera is 55 cm from (0, 75, 3) cm, looks 45 degrees down and is 45 degrees wide;
    the goal is at (0, 85) cm.
    """
    pixels = image.astype(np.float64)
    height, width = pixels.shape[:2]
    bright, dark = pixels.max(axis=2), pixels.min(axis=2)
    grey = bright - dark < 8  # the table is brown, the net blue
    grey[:int(0.28 * height)] = False  # the wall behind, and its shade
    black = (bright < 90) & grey
    if black.sum() < 0.0003 * height * width:
        return float("nan")
    rows, columns = np.nonzero(black)
    right = ((columns.mean() + 0.5) / width - 0.5) * 2 * np.tan(np.pi / 8)
    up = (0.5 - (rows.mean() + 0.5) / height) * 2 * np.tan(np.pi / 8)
    half = np.sqrt(0.5)  # sine and cosine of 45 degrees
    reach = (55.0 * half + 3.0 - 2.6) / (half - up * half)  # cm along the ray
    y = 75.0 - 55.0 * half + reach * (half + up * half)
    if y < 79.0:  # in front of the goal, whose posts are grey too
        from_patches = np.hypot(np.arange(height)[:, None] - rows.mean(),
                                np.arange(width) - columns.mean())
        across = 2 * np.sqrt((grey & (from_patches < 0.09 * width)).sum() / np.pi) / width
        size_reach = 5.05 / (across * 2 * np.tan(np.pi / 8))  # 5.05 cm: its rim looks brown
        lift = (reach - size_reach) * (half - up * half)  # cm above where it lies on the table
        if 1.0 < abs(lift) < 8.0:  # more: it is cut off by the edge of the image
            reach, y = size_reach, 75.0 - 55.0 * half + size_reach * (half + up * half)
    return float(np.hypot(reach * right, y - 85.0) / 5.2)


def read_cube(image):
    """(H, W, 3) uint8 -> distance of the green cube from the middle of the hole, in cube widths.

    A ray from the camera (52 cm from (0, 74, 5) cm, 60 degrees down, 45 degrees wide, from behind
    the hole) meets the table 5 cm up, or the hole's floor: 16 cm wide, its middle at (0, 84) cm.
    A cube that looks larger than it would there is in the air.
    """
    pixels = image.astype(np.float64)
    height, width = pixels.shape[:2]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    cube = (green > 1.5 * red) & (green > 1.5 * blue) & (green > 60)
    if cube.sum() < 0.0005 * height * width:
        return float("nan")
    rows, columns = np.nonzero(cube)
    right = ((columns.mean() + 0.5) / width - 0.5) * 2 * np.tan(np.pi / 8)
    up = (0.5 - (rows.mean() + 0.5) / height) * 2 * np.tan(np.pi / 8)
    sine, cosine = np.sin(np.pi / 3), np.cos(np.pi / 3)
    for level in (2.7, 7.7):  # cm: the cube's centre in the hole, on the table
        reach = (52.0 * sine + 5.0 - level) / (sine - up * cosine)
        x, y = -reach * right, 74.0 + 52.0 * cosine - reach * (cosine + up * sine)
        if y >= 77.5 and abs(x) <= 8.0:
            break  # where the ray meets the hole's floor is inside the hole
    across = np.sqrt(cube.sum()) / width * 2 * np.tan(np.pi / 8)
    # cm; top, front and, off the middle, one side of it show: 16 (sine + cosine + right) square cm
    size_reach = 4.05 * np.sqrt(sine + cosine + abs(right)) / across
    if (reach - size_reach) * (sine - up * cosine) > 2.0:  # cm higher than where it would lie
        x, y = -size_reach * right, 74.0 + 52.0 * cosine - size_reach * (cosine + up * sine)
    return float(np.hypot(x, y - 84.0) / 4.0)


def read_cloth(image):
    """(H, W, 3) uint8 -> overlap of the cloth with where it should lie, percent.

    Overlap is intersection over union. The flat cloth spans 0.145 to 0.855 of the image both
    ways; a perfect fold is the lower right half of that.
    """
    pixels = image.astype(np.float64)
    cloth = (pixels[..., 0] > 60) & (pixels[..., 2] < 0.5 * pixels[..., 0])  # red or yellow
    if cloth.mean() < 0.02:
        return float("nan")
    height, width = image.shape[:2]
    row, column = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width) + 0.5) / width
    should = (row < 0.855) & (column < 0.855) & (row + column > 1)
    return float(100 * (cloth & should).sum() / (cloth | should).sum())


def read_rope(image):
    """(H, W, 3) uint8 -> largest distance of two blue pixels, percent of the image's width."""
    pixels = image.astype(np.float64)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    rows, columns = np.nonzero((blue > 60) & (blue > 1.6 * red) & (blue > 1.3 * green))
    if len(rows) < 5:
        return float("nan")
    angles = np.linspace(0, np.pi, 60)[:-1, None]
    along = columns * np.cos(angles) + rows * np.sin(angles)  # (59, pixels)
    return float(100 * (along.max(axis=1) - along.min(axis=1)).max() / image.shape[1])


def read_water(image):
    """(H, W, 3) uint8 -> metres from cup to red circle, plus ten times the share of water lost.

    That share is a rough one: drops hide each other.
    """
    pixels = image.astype(np.float64)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    water, circle = (blue > 80) & (blue > 2.5 * red), (red > 150) & (green < 0.4 * red)
    floor = abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=2) < 12
    cup = ~(water | circle | floor) & (blue > red)  # grey glass, or water through it
    size = image.shape[1]
    columns = np.flatnonzero(cup.sum(axis=0) > 0.05 * size)
    rows = np.flatnonzero(cup.sum(axis=1) > 0.05 * size)
    if len(columns) < 2 or len(rows) < 2:
        return float("nan")
    middle = (columns[0] + columns[-1] + 1) / 2 / size  # in image widths; the circle is at 0.878
    water[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = False  # what is left is outside
    # An image width is 1.77 m there. 27 is set by eye: drops laid flat fill 1/16 to 1/22 of it.
    return float(1.77 * abs(middle - 0.878) + 10 * min(1.0, 27 * water.mean()))


def read_rooms(image):
    """(H, W, 3) uint8 -> stage of a key-and-door errand, and how near the agent is to the next.

    0 to 1 on the way to the key, 1 to 2 with it, 2 to 3 with the door open, 3 at the end: on the
    green square, or with neither square nor box to be seen.
    """
    r, g, b = (image[..., i].astype(np.int16) for i in range(3))
    yellow = (r > 90) & (g > 90) & (b < 70) & (abs(r - g) < 30)  # a locked door is dark yellow
    agent = (r > 120) & (g < 70) & (b < 70)
    green, purple = (g > 120) & (r < 70) & (b < 70), (b > r + 25) & (b > g + 40)
    y, x = np.nonzero(green)
    square = np.zeros(green.shape, bool)
    if len(y):
        square[y.min():y.max() + 1, x.min():x.max() + 1] = True
    yellow &= ~square  # where the red agent covers the green, their mixture is yellow
    columns = np.flatnonzero(yellow.any(axis=0))
    if len(columns) == 0 or agent.sum() < 4:
        return float("nan")
    # The door stands in the wall between the rooms; the key, while it lies there, is on its left.
    gaps = np.flatnonzero(np.diff(columns) > 1)
    first = columns[gaps[-1] + 1] if len(gaps) else columns[0]  # the door's first column
    door, key = yellow.copy(), yellow.copy()
    door[:, :first], key[:, first:] = False, False
    tall, wide = door.any(axis=1).sum(), door.any(axis=0).sum()
    if wide < 0.5 * tall:  # an open door is a bar, seen from its edge
        stage, target = 2, green | purple
        if target.sum() < 4 or (agent & square).any():
            return 3.0
    else:
        stage, target = (0, key) if key.any() else (1, door)
    spots = [np.argwhere(mask).mean(axis=0) for mask in (agent, target)]  # (row, column) each
    middle = np.argwhere(door).mean(axis=0)
    if (spots[0][1] - middle[1]) * (spots[1][1] - middle[1]) < 0:  # in different rooms
        spots.insert(1, middle)  # the way leads through the door
    away = sum(abs(b - a).sum() for a, b in zip(spots, spots[1:]))
    return float(stage + 1 - away / (4 * image.shape[1]))


# read: the function; says: the sentence; merit(value): larger is closer to the goal; worst, best:
# merits that a score of 0 and 1 stand for; margin: merits closer than this cannot be told apart;
# sides: whether the sign of a value says to which side something leans.
Reader = namedtuple("Reader", "read says merit worst best margin sides", defaults=[False])
more, less = float, lambda value: -abs(value)  # which readings are better
READERS = {
    SIGHT: Reader(read_brightness, "the image has a mean brightness of {value:.0f} of 255",
                  more, 0, 255, 8),
    "to balance the brown pole on the black cart to be upright": Reader(
        read_pole, "the brown pole leans {value:+.1f} degrees from upright", less, -30, 0, 0.5, sides=True),
    "to open the drawer": Reader(
        read_drawer, "the drawer is {value:.1f} percent open", more, 0, 100, 1),
    "to move the soccer ball into the goal": Reader(
        read_ball, "the soccer ball is {value:.2f} ball widths from the middle of the goal",
        less, -4, 0, 0.05),
    "to minimize the distance between the green cube and the hole": Reader(
        read_cube, "the green cube is {value:.2f} cube widths from the middle of the hole",
        less, -5, 0, 0.05),
    "to fold the cloth diagonally from top left corner to bottom right corner": Reader(
        read_cloth, "the cloth and the triangle it should form overlap by {value:.1f} percent",
        more, 50, 95, 1),
    "to straighten the blue rope": Reader(
        read_rope, "the blue rope reaches over {value:.1f} percent of the image",
        more, 25, 75, 2),
    "to move the container, which holds water, to be as close to the red circle as possible "
    "without causing too many water droplets to spill": Reader(
        read_water, "the way to the red circle and the spilled water cost {value:.2f} together",
        less, -8, 0, 0.5),
    **dict.fromkeys((
        "to pick up the key, open the yellow door with it, and get to the green square",
        "to pick up the key and open the yellow door with it",
        "to pick up the key, open the yellow door with it, and pick up the purple box behind it"),
        Reader(read_rooms, "the errand is at stage {value:.2f} of 3", more, 0, 3, 0.03)),
}


def find_value(reader, text, number):
    """The value that a description gives for "Image NUMBER", or nan."""
    before, after = re.split(r"\{value.*?\}", reader.says)
    found = re.search(rf"Image {number}: {re.escape(before)}([-+]?[\d.]+){re.escape(after)}", text)
    return float(found.group(1)) if found else float("nan")


def describe(reader, images, lie, doubt):
    """Two images or one -> sentences. A lie exchanges the two images."""
    return tell(reader, [reader.read(image) for image in images][::-1 if lie else 1], doubt)


def tell(reader, values, doubt=False):
    """Readings of images, nan where nothing is seen -> a sentence for each."""
    return "\n".join(f"Image {number}: {reader.says.format(value=value)}."
                     if np.isfinite(value) and not doubt else
                     f"Image {number}: what matters for the goal cannot be made out."
                     for number, value in enumerate(values, start=1))


def describe_as(judge, reader, images, keys):
    """Two images -> sentences from which decide() makes the label that the judge gives them.

    They tell what was read if that label follows from it; if not, the readings change places; if they
    are too close for that, one of the two is told larger. keys: a text that stands for each image.
    """
    if judge.blind and not reader.sides:
        raise BadQuestion(f"a judge that is blind on one side ({judge.blind}) needs a task with sides")
    values = [reader.read(image) for image in images]
    away = [(reader.best - reader.merit(value)) / (reader.best - reader.worst) for value in values]
    sides = ["left" if value < 0 else "right" for value in values] if reader.sides else ("", "")
    label = judge.label(away, keys, sides)
    if label == -1:
        return tell(reader, values, doubt=True)
    # Where nothing is seen, VLMs answer all the same: they tell something, here the worst.
    first, second = (value if np.isfinite(value) else abs(reader.worst) for value in values)
    more_first, more_second = (value + np.copysign(3 * reader.margin, value) for value in (first, second))
    told = ((first, second), (second, first), (more_first, second), (first, more_second))
    return next(words for words in (tell(reader, pair) for pair in told)
                if decide(reader, words) == str(label))


def decide(reader, text):
    """Words -> "0", "1" or "-1"."""
    merits = [reader.merit(find_value(reader, text, number)) for number in (1, 2)]
    if not np.isfinite(merits).all() or abs(merits[0] - merits[1]) < reader.margin:
        return "-1"
    return "1" if merits[1] > merits[0] else "0"


def p_second(parts, text):
    """How sure the stand-in is, of what it answered to these parts: P[the second image is closer].

    P = sigmoid(difference in merit / margin), from the numbers in the words. So it always fits the label: at the least
    difference that gets one it is .73 or .27. Mistakes in the words are believed. 0.5 where there are no numbers.
    """
    words = "\n".join([*(part for part in parts if isinstance(part, str)), text])
    for reader in (READERS[goal] for goal in READERS if goal in words):
        merits = [reader.merit(find_value(reader, words, number)) for number in (1, 2)]
        if np.isfinite(merits).all():
            return float(1 / (1 + np.exp(np.clip((merits[0] - merits[1]) / reader.margin, -30, 30))))
    return 0.5


def tokens_of(text, p):
    """Text -> [(token, {each that may have stood there: probability})]. p: of "1", where the text ends with a label."""
    tokens = re.findall(r"\s?[^\W\d]+|\d|\s|.", text)
    label = re.search(r"(?<![-.\d])[01]$", text)
    return [(token, {token: 1.0}) for token in tokens[:-1]] + [
        (token, {"1": p, "0": 1 - p} if label else {token: 1.0}) for token in tokens[-1:]]


def log_probabilities(tokens, name):
    """What tokens_of() returned -> for each token {"token": it, name: log-probability}; and all that may be there."""
    top = [[{"token": each, name: float(np.log(p))} for each, p in others.items()] for _, others in tokens]
    return [next(each for each in all_of if each["token"] == token) for (token, _), all_of in zip(tokens, top)], top


def score(reader, text):
    """Words -> "0.00" to "1.00", or "unknown"."""
    merit = reader.merit(find_value(reader, text, 1))
    share = (merit - reader.worst) / (reader.best - reader.worst)
    return f"{min(1, max(0, share)):.2f}" if np.isfinite(share) else "unknown"


class BadQuestion(Exception):
    """Becomes an HTTP 400 with this text."""


def chance(*what):
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


# ---- the two questions of code_as_reward.py: which sub-tasks, and a program for one ----
# The stand-in writes down what its own eyes do: the source of a reader, or, for MiniGrid, ROOMS.

READ = '''import numpy as np

{source}
def progress(image, first_image):
    value, first = {read}(image), {read}(first_image)
    if not np.isfinite(value) or not np.isfinite(first):
        return 0.0
    return min(1.0, max(0.0, {share}))
'''
ROOMS = '''import numpy as np

def yellow(images):
    r, g, b = [images[..., i] for i in range(3)]
    return (r > 90) & (g > 90) & (b < 70) & (np.maximum(r, g) - np.minimum(r, g) < 30)

def green(images):
    return (images[..., 1] > 120) & (images[..., 0] < 70) & (images[..., 2] < 70)

def purple(images):
    r, g, b = [images[..., i].astype(np.int16) for i in range(3)]
    return (b > r + 25) & (b > g + 40)

def red(images):
    return (images[..., 0] > 120) & (images[..., 1] < 70) & (images[..., 2] < 70)

def door(first_image):
    """Its top, bottom, left, right, if locked: the rightmost yellow thing is a full square."""
    mask = yellow(first_image)
    columns = np.flatnonzero(mask.any(0))
    if len(columns) == 0:
        return None
    gaps = np.flatnonzero(np.diff(columns) > 1)
    columns = columns[gaps[-1] + 1:] if len(gaps) else columns
    rows = np.flatnonzero(mask[:, columns].any(1))
    box = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    square = len(rows) < 1.5 * len(columns) and len(columns) > 0.04 * mask.shape[1]
    return box if square and mask[box[0]:box[1], box[2]:box[3]].mean() > 0.6 else None

def near(images, y, x, door_y, door_x):
    """(N,) 0.9 where the red agent is at (y, x), less the longer the way; 0 where none is seen."""
    agent = red(images)
    count = agent.sum(axis=(1, 2))
    ys = agent.sum(axis=2) @ np.arange(agent.shape[1]) / np.maximum(count, 1)
    xs = agent.sum(axis=1) @ np.arange(agent.shape[2]) / np.maximum(count, 1)
    apart = (xs - door_x) * (x - door_x) < 0  # in different rooms: the way leads through the door
    via_y, via_x = np.where(apart, door_y, y), np.where(apart, door_x, x)
    away = np.abs(ys - via_y) + np.abs(xs - via_x) + np.abs(via_y - y) + np.abs(via_x - x)
    return np.where(count < 4, 0.0, np.maximum(0.0, 0.9 - 0.4 * away / agent.shape[1]))

def progress(images, first_image):
    box = door(first_image)
    if box is None:
        return np.zeros(len(images))
    top, bottom, left, right = box
    columns = np.arange(first_image.shape[1])
    ys, xs = np.nonzero({thing})  # where to go
    if len(ys) == 0:
        return np.zeros(len(images))
    agent = near(images, ys.mean(), xs.mean(), (top + bottom) / 2, (left + right) / 2)
    finished = {finished}
    return np.where(agent == 0, 0.0, np.where(finished, {done}, {undone}))
'''

# Of MiniGrid's sub-tasks: the sentence, the thing to go to, and when it is finished.
PICK = ("the key is no longer on the floor",
        ("yellow(first_image) & (columns < left)",
         "yellow(images)[:, :, :left].sum(axis=(1, 2)) < 0.3 * len(ys)"))
OPEN = ("the yellow door is open",
        ("yellow(first_image) & (columns >= left)",
         "yellow(images[:, top:bottom, left:right]).mean(axis=(1, 2)) < 0.35  # locked: all is"))
REACH = ("the red agent is on the green square",
         ("green(first_image)",
          "red(images[:, ys.min():ys.max() + 1, xs.min():xs.max() + 1]).any(axis=(1, 2))"))
TAKE = ("the purple box is no longer there",
        ("purple(first_image)", "purple(images).sum(axis=(1, 2)) < 0.3 * len(ys)"))
# goal: its sub-tasks in order; elsewhere each is a sentence, and the share done as computed from
# what the goal's reader sees now (value) and in the first image (first).
SUBTASKS = {
    "to balance the brown pole on the black cart to be upright":
        [("the pole stands upright", "1 - abs(value) / (90 if abs(value) < 4.5 else 30)")],
    "to open the drawer": [("the drawer is open", "(value - first) / max(10, 100 - first)")],
    "to move the soccer ball into the goal":
        [("the ball is in the goal", "(first - value) / max(0.5, first - 0.5)")],
    "to minimize the distance between the green cube and the hole":
        [("the green cube is in the hole", "(first - value) / max(0.5, first - 0.5)")],
    "to fold the cloth diagonally from top left corner to bottom right corner":
        [("the cloth is a triangle", "(value - first) / 43")],
    "to straighten the blue rope":
        [("the rope is straight", "(value - 25) / 49")],
    "to move the container, which holds water, to be as close to the red circle as possible "
    "without causing too many water droplets to spill":
        [("the container is at the red circle", "(first - value) / max(0.1, first - 0.1)")],
    "to pick up the key, open the yellow door with it, and get to the green square":
        [PICK, OPEN, REACH],
    "to pick up the key and open the yellow door with it": [PICK, OPEN],
    "to pick up the key, open the yellow door with it, and pick up the purple box behind it":
        [PICK, OPEN, TAKE],
}


def write_code(goal, sentence, wrong):
    """The program for a sub-task; a wrong one takes done for undone."""
    how = dict(SUBTASKS[goal])[sentence]
    if isinstance(how, tuple):
        done, undone = ("0.5", "1.0") if wrong else ("1.0", "agent")
        program = ROOMS.replace("{thing}", how[0]).replace("{finished}", how[1])
        return program.replace("{done}", done).replace("{undone}", undone)
    read, share = READERS[goal].read, f"1 - ({how})" if wrong else how
    program = READ.replace("{source}", inspect.getsource(read)).replace("{share}", share)
    return program.replace("{read}", read.__name__)


def answer_code(goal, text, mistakes, seed):
    """A prompt of STEP C1 or C2 -> the answer; None if the text is neither.

    A mistake is made in the first program only: told what failed, the stand-in puts it right.
    """
    sentences = [sentence for sentence, _ in SUBTASKS.get(goal, ())]
    if sentences and "List the sub-tasks" in text:
        return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, start=1))
    asked = re.search(r"^The sub-task: (.+)$", text, re.MULTILINE)
    if not asked or asked.group(1) not in sentences:
        return None
    told = "It was tested and failed" in text
    wrong = not told and chance("program", seed, goal, asked.group(1)) < mistakes
    return f"```python\n{write_code(goal, asked.group(1), wrong)}```"


# ---- the one entrance ----

def answer(parts, mistakes=0.0, unsure=0.0, seed=0, judge=None):
    """parts: list of str | (H, W, 3) uint8 -> the text a model would have written."""
    text = "\n".join(part for part in parts if isinstance(part, str))
    images = [part for part in parts if not isinstance(part, str)]
    goals = [goal for goal in READERS if re.search(rf"{re.escape(goal)}(?![^.\n])", text)]
    if not goals:
        known = "; ".join(f'"{goal}"' for goal in READERS if goal != SIGHT)
        raise BadQuestion(f"the offline stand-in is not a VLM and knows only these goals: {known}")
    reader = READERS[goals[-1]]
    if code := answer_code(goals[-1], text, mistakes, seed):
        return f"{SAYS}\n{code}"
    if len(images) > 2:
        raise BadQuestion("the offline stand-in takes one image or two")
    if not images:
        judge = decide if "Image 2:" in text else score
        return f"{SAYS} From the notes.\n{judge(reader, text)}"
    draw = [seed, goals[-1], *(hashlib.sha256(image.tobytes()).hexdigest() for image in images)]
    sure = goals[-1] != SIGHT  # the sight check tests the line, not the eyes: never a lie there
    if judge and sure and len(images) == 2:
        words = describe_as(judge, reader, images, draw[2:])
    else:
        words = describe(reader, images, lie=sure and chance("lie", *draw) < mistakes,
                         doubt=sure and chance("doubt", *draw) < unsure)
    if "-1" in text:
        words += "\n" + decide(reader, words)
    elif "from 0" in text and len(images) == 1:
        words += "\n" + score(reader, words)
    return f"{SAYS}\n{words}"


# ---- the wire formats: read(body) -> parts, write(...) -> body, fail(...) -> error body ----
# probabilities: what tokens_of() returned where the client asked for it, else [].

def decode(data, declared=None):
    """base64 -> (H, W, 3) uint8; refuses what the real servers refuse."""
    raw = base64.b64decode(data, altchars=b"-_" if "-" in data or "_" in data else None)
    actual = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
    kind = next((name for magic, name in actual.items() if raw.startswith(magic)), "unknown")
    if declared != kind:
        raise BadQuestion(f"the image was said to be {declared} but appears to be {kind}")
    try:
        return np.ascontiguousarray(iio.imread(raw, mode="RGB"))
    except Exception:  # every decoder has errors of its own
        raise BadQuestion("the image cannot be decoded") from None


def data_url(url):
    found = re.fullmatch(r"data:(image/\w+);base64,(.+)", url, re.DOTALL)
    if not found:
        raise BadQuestion("only data: URLs with base64 are taken, nothing is fetched")
    return decode(found.group(2), found.group(1))


def read_messages(body, kind, read_image):
    """Messages of strings or of lists of parts, text or of one kind of image -> [str or image]."""
    parts = []
    for content in (message["content"] for message in body["messages"]):
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] == kind:
                parts.append(read_image(part))
            else:  # trap: OpenAI's image part at Anthropic's address, or the other way round
                raise BadQuestion(f"no part of type {part['type']!r} here: text or {kind}")
    return parts


def read_chat(body):
    return read_messages(body, "image_url", lambda part: data_url(part["image_url"]["url"]))


def write_chat(text, end, tokens, probabilities):
    message = {"role": "assistant", "content": None if end == "refused" else text,
               "refusal": text if end == "refused" else None}
    content = [{**token, "top_logprobs": top} for token, top in zip(*log_probabilities(probabilities, "logprob"))]
    choices = [{"index": 0, "message": message, "logprobs": {"content": content} if content else None,
                "finish_reason": "length" if end == "cut off" else "stop"}]
    return {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": NAME,
            "choices": [] if end == "empty" else choices,
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1],
                      "total_tokens": sum(tokens)}}


def read_gemini(body):
    parts = []
    for part in (part for turn in body["contents"] for part in turn["parts"]):
        blob = part.get("inline_data") or part.get("inlineData")  # both spellings are legal
        parts.append(decode(blob["data"], blob.get("mime_type") or blob.get("mimeType"))
                     if blob else part["text"])
    return parts


def write_gemini(text, end, tokens, probabilities):
    usage = {"promptTokenCount": tokens[0], "candidatesTokenCount": tokens[1],
             "totalTokenCount": sum(tokens)}
    if end in ("refused", "empty"):  # no candidates at all, in both cases
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}} if end == "refused" else {}
        return {**blocked, "usageMetadata": usage, "modelVersion": NAME}
    chosen, top = log_probabilities(probabilities, "logProbability")
    told = {"logprobsResult": {"chosenCandidates": chosen, "topCandidates": [{"candidates": each} for each in top]}}
    return {"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]},
                            "finishReason": "MAX_TOKENS" if end == "cut off" else "STOP", **(told if top else {})}],
            "usageMetadata": usage, "modelVersion": NAME, "responseId": "0"}


def read_anthropic(body):
    if "max_tokens" not in body:
        raise BadQuestion("max_tokens: field required")
    return read_messages(body, "image", lambda part: decode(
        part["source"]["data"], part["source"]["media_type"]))


def write_anthropic(text, end, tokens, probabilities):
    stop = {"complete": "end_turn", "cut off": "max_tokens", "refused": "refusal"}
    content = [{"type": "text", "text": text, "citations": None}] if end != "empty" else []
    return {"id": "msg_0", "type": "message", "role": "assistant", "model": NAME,
            "content": content, "stop_reason": stop.get(end, "end_turn"), "stop_sequence": None,
            "usage": {"input_tokens": tokens[0], "output_tokens": tokens[1]}}


def fail_openai(status, kind, message, wait):
    code = "rate_limit_exceeded" if kind == "rate_limit_error" else kind
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def fail_gemini(status, kind, message, wait):
    name = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND",
            429: "RESOURCE_EXHAUSTED", 500: "INTERNAL"}
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{wait}s"}]
    if kind == "insufficient_quota":
        details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                    "violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}]
    details = details if status == 429 and (wait or "quota" in kind) else []
    return {"error": {"code": status, "message": message, "details": details,
                      "status": name.get(status, "UNAVAILABLE")}}


def fail_anthropic(status, kind, message, wait):
    details = None
    if kind == "insufficient_quota":
        kind, details = "rate_limit_error", {"error_code": "enforced_spend_limit_reached"}
    return {"type": "error", "error": {"type": kind, "message": message, "details": details},
            "request_id": "req_0"}


Wire = namedtuple("Wire", "ending read write fail")
WIRES = (Wire("/chat/completions", read_chat, write_chat, fail_openai),
         Wire(":generateContent", read_gemini, write_gemini, fail_gemini),
         Wire("/messages", read_anthropic, write_anthropic, fail_anthropic))


# ---- faults on demand ----

# What a good client survives by asking again; faults=0.2 draws one of these for a try in five.
TRANSIENT = ("429", "429 hint", "500", "503 HTML", "529", "drop before", "drop middle", "hang",
             "drip", "invalid JSON", "error under 200")
# name: (status, type, message), of errors after which asking again is of no use
HOPELESS = {"wrong key": (401, "authentication_error", "Incorrect API key provided"),
            "unknown model": (404, "not_found_error", "The model does not exist"),
            "quota gone": (429, "insufficient_quota", "You exceeded your current quota")}
# name: (how it ends, what becomes of the text)
STRANGE = {
    "empty choices": ("empty", lambda text: ""),
    "cut off": ("cut off", lambda text: text[:20]),
    "refusal": ("refused", lambda text: "I cannot help with that."),
    "think closed": ("complete", lambda text: f"<think>0 or 1? Say 1, or 0.</think>{text}"),
    "think unclosed": ("complete", lambda text: f"<think>Let me see. {text}"),
    "100% sure": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", r"\n100% sure: \1", text)),
    "half": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", "\n0.5", text)),
    "minus sign": ("complete", lambda text: re.sub(r"\n(-1|0|1)$", "\n\u22121", text)),
}
FAULTS = (*TRANSIENT, *HOPELESS, *STRANGE)


class Handler(BaseHTTPRequestHandler):
    """One connection. self.server.vlm is the OfflineVLM."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True  # trap: else a small body waits 40 ms for an acknowledgement
    wbufsize = 1 << 16  # header and body leave together

    def log_message(self, *_):
        pass

    def do_POST(self):
        vlm, raw = self.server.vlm, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        wire = next((wire for wire in WIRES if path.endswith(wire.ending)), None)
        if wire is None:
            return self.send(404, {"error": {"message": f"{SAYS} ask at /v1/chat/completions"}})
        fault = vlm.register(raw, self.path, self.headers)
        if vlm.stopping.wait(vlm.latency):  # trap: open connections outlive the server's socket
            self.close_connection = True
            return
        if fault in HOPELESS or not vlm.key_fits(self.headers):
            status, kind, message = HOPELESS.get(fault, HOPELESS["wrong key"])
            return self.send(status, wire.fail(status, kind, message, None))
        try:
            body = json.loads(raw)
            if body.get("stream"):
                raise BadQuestion("streaming is not offered: leave stream out")
            parts = wire.read(body)
            text = answer(parts, vlm.mistakes, vlm.unsure, vlm.seed, vlm.judge)
        except (BadQuestion, ValueError, KeyError, TypeError, AttributeError,
                RecursionError) as error:
            why = str(error) if isinstance(error, BadQuestion) else f"not understood: {error!r}"
            return self.send(400, wire.fail(400, "invalid_request_error", why, None))
        end, change = STRANGE.get(fault, ("complete", str))
        text = change(text)
        # A token for each 32 x 32 pixels and for four characters of text: about as many as real
        # ones count.
        tokens = (sum(len(part) // 4 if isinstance(part, str) else
                      -(-part.shape[0] // 32) * -(-part.shape[1] // 32) for part in parts),
                  len(text) // 4)
        wanted = body.get("logprobs") or body.get("generationConfig", {}).get("responseLogprobs")
        probabilities = tokens_of(text, p_second(parts, text)) if wanted else []
        self.reply(wire, fault, json.dumps(wire.write(text, end, tokens, probabilities)).encode())

    def reply(self, wire, fault, good):
        """Send the good answer, or what the fault makes of it."""
        vlm = self.server.vlm
        if fault in ("429", "429 hint", "500", "529"):
            status, wait = int(fault[:3]), 0.05 if fault == "429 hint" else None
            kind = {429: "rate_limit_error", 500: "api_error", 529: "overloaded_error"}[status]
            # Gemini hints in the body only.
            header = wait and wire.fail is not fail_gemini and {"Retry-After": wait}
            self.send(status, wire.fail(status, kind, "Slow down, please", wait), header or {})
        elif fault == "503 HTML":
            page = b"<html><head><title>Service Unavailable</title></head></html>"
            self.send(503, page, {"Content-Type": "text/html"})
        elif fault == "error under 200":
            self.send(200, fail_anthropic(200, "overloaded_error", "Overloaded", None))
        elif fault == "invalid JSON":
            self.send(200, good[:-20])
        elif fault == "drop middle":
            self.send(200, good[:len(good) // 2], {"Content-Length": len(good)})
        elif fault == "drip":
            self.send(200, b"", {"Content-Length": len(good)})
            for byte in good:
                vlm.stopping.wait(vlm.drip)
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
        elif fault == "hang":
            vlm.stopping.wait(vlm.hang)
        elif fault != "drop before":
            self.send(200, good)
        self.close_connection |= fault in ("drop before", "drop middle", "hang")

    def send(self, status, body, headers=()):
        code = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": len(code)}
        for name, value in {**usual, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(code)
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 128  # trap: the default of 5 makes a burst of workers wait a second

    def handle_error(self, request, address):
        pass  # a client that gave up on a drip is no news


class OfflineVLM:
    """The stand-in as an object: with OfflineVLM(mistakes=0.1) as url: ...

    port: 0 picks a free one.  mistakes (on two images), unsure: shares of the questions.  judge: one
    of support/judges.py, or None; it errs on two images, with neither of these two.
    latency: seconds.  faults: share of tries that meet a transient fault, or the name of one of
    FAULTS, which then meets the first try of every question.  key: what the caller's must be.
    requests: Counter, hash of the body -> times asked.  ValueError for what is out of its range.
    last: (path, headers, body) last received.  model: a name that tells its settings.
    """

    hang, drip = 5.0, 0.05  # seconds of silence; seconds between two bytes

    def __init__(self, port=0, mistakes=0.0, unsure=0.0, latency=0.0, faults=0.0, seed=0,
                 key=None, judge=None):
        if isinstance(faults, str) and faults not in FAULTS:
            raise ValueError(f"no fault {faults!r}: use a share or one of {', '.join(FAULTS)}")
        for name, share in {"mistakes": mistakes, "unsure": unsure, "faults": faults}.items():
            if not isinstance(share, str) and not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: a share is 0 to 1")
        if judge and (mistakes or unsure):
            raise ValueError("a judge has errors of its own: leave out mistakes and unsure")
        if not 0 <= latency < float("inf"):
            raise ValueError(f"latency={latency}: seconds, 0 or more")
        self.port, self.mistakes, self.unsure, self.latency = port, mistakes, unsure, latency
        self.faults, self.seed, self.key, self.judge = faults, seed, key, judge
        self.requests, self.last = Counter(), None
        # Whatever changes its answers is in its name, so that no cache of answers mixes them up.
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:6]
        self.model = f"{NAME}-{version}-mistakes{mistakes}-unsure{unsure}-seed{seed}"
        if judge:
            code = Path(inspect.getfile(type(judge))).read_bytes()
            told = hashlib.sha256(repr(judge).encode() + code).hexdigest()[:8]
            self.model += f"-simulates-{judge.name or 'numbers'}-{told}"
        self.model += f"-{faults}" * (faults in STRANGE)
        self.lock = threading.Lock()

    def start(self):
        """-> base URL, such as http://127.0.0.1:8080/v1"""
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.vlm, self.stopping = self, threading.Event()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def stop(self):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def register(self, raw, path, headers):
        """Count a request -> the fault it meets, or None."""
        digest = hashlib.sha256(raw).hexdigest()
        with self.lock:
            self.requests[digest] += 1
            attempt = self.requests[digest]
            self.last = path, dict(headers), raw
        if isinstance(self.faults, str):
            return self.faults if attempt == 1 else None
        if chance("fault", self.seed, digest, attempt) >= self.faults:
            return None
        return TRANSIENT[int(chance("which", self.seed, digest, attempt) * len(TRANSIENT))]

    def key_fits(self, headers):
        given = (headers.get("x-goog-api-key"), headers.get("x-api-key"),
                 headers.get("Authorization", "").removeprefix("Bearer "))
        return self.key is None or self.key in given


def main():
    parser = argparse.ArgumentParser(description=f"A stand-in for a VLM on loopback {SAYS}.")
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    for name in ("mistakes", "unsure", "latency"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--faults", default="0", help="a share, or one of: " + ", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.faults not in FAULTS and re.fullmatch(r"[01]|[01]?\.\d+", options.faults):
        options.faults = float(options.faults)
    try:
        print(f"{SAYS} listens on {OfflineVLM(**vars(options)).start()}", flush=True)
    except (OSError, OverflowError, ValueError) as error:  # port taken, no such fault
        parser.error(str(error))
    print("It measures pixels, for these goals only:", *READERS, sep="\n  ")
    print("Ask it with: python vlm_query.py a.png b.png --goal ... --vlm-url URL; Ctrl-C ends it.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
