"""Is this VLM good enough for this task? Ask it a hundred pairs whose true order is known, before spending on RL.

    python -m tools.audit_vlm --env DrawerOpen --vlm openai/MODEL --usd-per-mtok 0.10,0.50

What this is: a script that wires the components as train.py does. Which STEPs: 2, pick pairs of images, and 3, ask the
VLM which image is closer to the goal, by the same code and with the same images as in training.

Images come in equal parts from three kinds of episodes: random actions; half-trained; the task's scripted expert.
Half-trained means: the expert, acting at random in 30, 50 or 70 % of the steps (it finds its way late and not always),
or, with `--policy RUN_FOLDER`, the newest policy of a run of train.py. Pairs are spread evenly over BINS of their
difference in true progress, as a share of the range of all images. Each is asked in both orders, and in both ways:
describe, then decide (two calls, the paper's), and all in one call.

The verdict is about the pairs whose difference is above a tenth of the range, and the way that `--stages` names:
    not good enough  if fewer than half of the questions got a label, or P(right) < 3/4
    good enough      if P(right) > 3/4;      undecided if the 95 % interval of P(right) has 3/4 in it
where P(right) is the share of labels that are right, its interval Wilson's, with one draw per pair (the two orders of a
pair are no two draws). 3/4 because a reward learned from fewer right answers needs several times as many of them.

The folder (`--out`, default runs/audit-...): audit.txt (all that is printed), audit.csv, audit.png, labels.jsonl with
every answer, pairs/*.png, config.json. Answers are kept in vlm_cache beside it, where train.py looks for them too.

To use it elsewhere:
    from tools import audit_vlm
    from support.settings import Config
    result = audit_vlm.audit(Config(env="CartPole", vlm="offline", out="an_audit"), pairs=20)
    print(result["verdict"])
    print(result["rows"][0])
"""
import argparse
import csv
import dataclasses
import json
import os
import sys
import time

import numpy as np

import envs
from support import settings
from support.labeler import make_labeler
from support.run import prepare, random_action, write_json

BINS = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)  # edges; differences in progress as a share of the range
CLEAR, ENOUGH_RIGHT, ENOUGH_LABELS = 0.1, 0.75, 0.5  # the rule of the verdict, see above
PER_KIND, PER_EPISODE = 40, 10  # images of each kind of episode, and of one episode, evenly spaced in it
NOISE = (0.3, 0.5, 0.7)  # share of random actions in "half-trained" episodes
AUDIT_SEED = 3_000_000  # of the first episode; no image that train.py learns from has it (--seed below 10)
KINDS = ("right", "wrong", "unsure", "unreadable", "no answer", "limit")  # what can come of a question
WAYS = {2: "two stages", 1: "one call"}


# ---- the images ----
def policies(config, env, folder, rng):
    """{kind: function of the episode's number -> (obs -> action)} of those kinds that this task has."""
    def at_random(obs):
        return random_action(env.action_space, rng)

    kinds = {"random": lambda episode: at_random}
    try:
        expert = envs.expert(env)
        kinds["expert"] = lambda episode: expert
        kinds["half-trained"] = lambda episode: lambda obs: (
            at_random(obs) if rng.random() < NOISE[episode % len(NOISE)] else expert(obs))
    except ValueError:
        pass  # a foreign environment has no scripted expert
    if folder:
        learned = trained_policy(folder, config, env)
        kinds["half-trained"] = lambda episode: learned
    return kinds


def trained_policy(folder, config, env):
    """The newest policy of a run folder of train.py, exploring as it did in training -> obs -> action."""
    import torch

    import sac

    try:
        with open(os.path.join(folder, "config.json")) as file:
            stored = json.load(file)
        state = torch.load(os.path.join(folder, "checkpoint", "state.pt"), weights_only=True)
        if stored["env"] != config.env:
            raise ValueError(f"it was trained on {stored['env']}")
        agent = sac.SAC(env.observation_space.shape[0], env.action_space, (stored["hidden"],) * 2,
                        device=stored["device"], seed=config.seed)  # where its random numbers can go on
        agent.load_state_dict(state["pi"])
    except Exception as error:  # unpickling a foreign file may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise settings.UserError(f"--policy {folder}: no run of train.py that can be used here ({reason})") from None
    return agent.act


def collect(config, env, folder, rng):
    """PER_KIND images of each kind of episode -> images (N, P, P, 3) uint8, true progress (N,), kind (N,) str."""
    from tqdm import tqdm

    images, progress, kind_of, seed = [], [], [], AUDIT_SEED + 1000 * config.seed
    kinds = policies(config, env, folder, rng)
    with tqdm(total=PER_KIND * len(kinds), desc="images", unit="image") as bar:
        for kind, policy in kinds.items():
            kept = 0
            for episode in range(PER_KIND):
                seen, _, values, _ = envs.rollout(env, policy(episode), seed % 2**32, config.vlm_image_size)
                seed += 1
                count = min(PER_EPISODE, PER_KIND - kept, len(seen))
                chosen = np.linspace(0, len(seen) - 1, count).round().astype(int)
                images += list(seen[chosen])  # copies: the rest of the episode is let go
                progress += list(values[chosen])
                kept += count
                bar.update(count)
                if kept == PER_KIND:
                    break
            kind_of += [kind] * kept
    return np.stack(images), np.array(progress), np.array(kind_of)


# ---- STEP 2: pick pairs of images ----
def draw_pairs(images, progress, count, rng):
    """Pairs evenly spread over BINS -> pairs (M, 2), difference in progress as a share of the range (M,).

    A bin that runs out of pairs leaves its share to the others. Equal progress and equal looks are left out: the first
    has no right answer, the second is never sent.
    """
    from vlm_query import looks_identical

    span = np.ptp(progress)
    if not span > 0:
        raise settings.UserError(f"all {len(images)} images have the same progress: there is nothing to compare")
    pairs = np.stack(np.triu_indices(len(images), 1), axis=1)  # (N (N - 1) / 2, 2)
    pairs = rng.permuted(rng.permutation(pairs), axis=1)  # in random order, and each turned round or not
    gap = np.abs(progress[pairs[:, 1]] - progress[pairs[:, 0]]) / span
    left = [list(np.flatnonzero((gap > low) & (gap <= high))) for low, high in zip(BINS, BINS[1:])]
    chosen = []
    while len(chosen) < count and any(left):
        for rows in left:
            while rows and looks_identical(*images[pairs[rows[-1]]]):
                rows.pop()
            if rows and len(chosen) < count:
                chosen.append(rows.pop())
    return pairs[chosen], gap[chosen]


# ---- STEP 3: ask the VLM which image is closer to the goal ----
def ask_all(config, labeler, images, progress, pairs, gap):
    """Every pair in both orders and both ways -> records as in labels.jsonl; on disk as soon as they are known."""
    import imageio
    import vlm_query
    from tqdm import tqdm

    log, records = vlm_query.LabelLog(os.path.join(config.out, "labels.jsonl")), []
    os.makedirs(os.path.join(config.out, "pairs"))
    for index, (pair, turned) in enumerate((pair, turned) for pair in pairs for turned in (0, 1)):
        both = images[pair[::-1] if turned else pair]  # (2, P, P, 3)
        imageio.imwrite(os.path.join(config.out, "pairs", f"{index:06d}.png"), np.hstack(both))
    with tqdm(total=4 * len(pairs), desc="questions", unit="question") as bar:
        for stages in WAYS:
            for turned in (0, 1):
                shown = pairs[:, ::-1] if turned else pairs  # (M, 2)
                true_label = (progress[shown[:, 1]] > progress[shown[:, 0]]).astype(int)  # (M,)

                def keep(record):
                    i = record["pair"]
                    record = {"index": 2 * i + turned, "order": turned, **record, "true_label": int(true_label[i]),
                              "progress": progress[shown[i]].tolist(), "difference": float(gap[i])}
                    log.append(record)
                    records.append(record)
                    bar.update()

                ask_batch(labeler.vlm, images[shown[:, 0]], images[shown[:, 1]], config, stages, keep)
    log.close()
    return records


def ask_batch(vlm, first, second, config, stages, keep):
    """label_pairs, but a VLM whose answers cannot be read is a finding here and no reason to stop."""
    import vlm_query

    kinds = []
    try:
        vlm_query.label_pairs(vlm, first, second, config.goal, stages, config.workers,
                              lambda record: (kinds.append(record["kind"]), keep(record)))
    except vlm_query.VLMError:
        asked = len(kinds) - kinds.count("limit") - kinds.count("identical")
        if len(kinds) < len(first) or 2 * kinds.count("no answer") > asked:
            raise  # a wrong key, an outage: that says nothing about the VLM


# ---- what the answers say ----
def outcome(record):
    """One of KINDS."""
    if record["kind"] != "label":
        return record["kind"]
    return "right" if record["label"] == record["true_label"] else "wrong"


def share(part, whole):
    return part / whole if whole else float("nan")


def wilson(right, draws, z=1.96):
    """95 % interval of a share (Wilson 1927): (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    if not draws:
        return 0.0, 1.0
    centre, width = right + z**2 / (2 * draws), z * np.sqrt(right * (1 - right) / draws + (z / (2 * draws)) ** 2)
    return float((centre - width) / (1 + z**2 / draws)), float((centre + width) / (1 + z**2 / draws))


def summary(records, price=None):
    """Some of the records -> one row of audit.csv: how many came to what, how right, how even, at what cost each.

    first_share: of the labels, how many pick the first image; one half, as every pair is asked in both orders.
    consistent: of the pairs with a label in both orders, how many pick the same image twice.
    """
    came = [outcome(record) for record in records]
    asked = [record for record in records if record["kind"] != "limit"]
    labels = [record for record in records if record["kind"] == "label"]
    picked = {}
    for record in labels:  # "" -> {pair: [0 or 1 for the pair's own first or second image, once an order]}
        picked.setdefault(record["pair"], []).append(record["label"] ^ record["order"])
    twice = [picks for picks in picked.values() if len(picks) == 2]
    fresh = [record["seconds"] for record in asked if not record["cached"]]
    tokens = [sum(record[name] for record in asked) for name in ("tokens_in", "tokens_out")]
    right = share(came.count("right"), len(labels))
    return {
        "questions": len(asked), **{kind.replace(" ", "_"): came.count(kind) for kind in KINDS},
        "accuracy": right, "accuracy_low": wilson(right, len(picked))[0],
        "accuracy_high": wilson(right, len(picked))[1], "labelled": share(len(labels), len(asked)),
        "first_share": share(sum(record["label"] == 0 for record in labels), len(labels)),
        "consistent": share(sum(a == b for a, b in twice), len(twice)),
        "tokens_in": share(tokens[0], len(asked)), "tokens_out": share(tokens[1], len(asked)),
        "seconds": share(sum(fresh), len(fresh)),  # those from the cache took none
        "usd": share(tokens[0] * price[0] + tokens[1] * price[1], 1e6 * len(asked)) if price else None,
    }


def summaries(records, price):
    """The rows of audit.csv: for each way, each bin, then the pairs the verdict is about, then all."""
    parts = [*zip(BINS, BINS[1:]), (CLEAR, 1.0), (0.0, 1.0)]
    return [{"stages": stages, "low": low, "high": high,
             **summary([r for r in records if r["stages"] == stages and low < r["difference"] <= high], price)}
            for stages in WAYS for low, high in parts]


def of(rows, stages, low):
    """The row of that way about all differences above `low`."""
    return next(row for row in rows if (row["stages"], row["low"], row["high"]) == (stages, low, 1.0))


def verdict(rows, stages):
    """The rule in the header -> one line."""
    row = of(rows, stages, CLEAR)
    found = (f"{percent(row['accuracy'])} right ({percent(row['accuracy_low'])} to {percent(row['accuracy_high'])}) "
             f"where the difference is above a tenth of the range, {percent(row['labelled'])} of these questions got "
             "a label")
    if not row["questions"]:
        return "undecided: no question about a clear difference was asked"
    if row["labelled"] < ENOUGH_LABELS or row["accuracy_high"] < ENOUGH_RIGHT:
        return f"not good enough: {found}"
    return f"good enough: {found}" if row["accuracy_low"] > ENOUGH_RIGHT else f"undecided, ask more --pairs: {found}"


# ---- in words and images ----
def percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.0f} %"


def describe(rows, config, kinds):
    """The whole text of audit.txt."""
    who = settings.who_labels(config)
    text = [f"{config.env}: {config.goal}", f"labels from: {who}",
            "images: " + ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in dict.fromkeys(kinds))]
    for stages, way in WAYS.items():
        text += ["", f"{way}, by {who}",
                 "difference    questions  right  wrong  unsure  unreadable  no answer  accuracy  picks first"]
        for row in (row for row in rows if row["stages"] == stages and (row["low"], row["high"]) != (CLEAR, 1.0)):
            text += [f"{100 * row['low']:3.0f} to {100 * row['high']:3.0f} %{row['questions']:11d}{row['right']:7d}"
                     f"{row['wrong']:7d}{row['unsure']:8d}{row['unreadable']:12d}{row['no_answer']:11d}"
                     f"{percent(row['accuracy']):>10}{percent(row['first_share']):>13}"]
        everything = of(rows, stages, 0.0)
        text += [f"the same image in both orders: {percent(everything['consistent'])} of the pairs with two labels",
                 *cost_lines(everything, stages, config)]
        if everything["limit"]:
            text += [f"{everything['limit']} questions were not asked: a limit was reached"]
    two, one = of(rows, 2, CLEAR), of(rows, 1, CLEAR)
    as_good = one["accuracy"] >= two["accuracy"] and one["labelled"] >= two["labelled"]
    text += ["", f"two stages against one call, above a tenth of the range: {percent(two['accuracy'])} against "
             f"{percent(one['accuracy'])} right, {percent(two['labelled'])} against {percent(one['labelled'])} labelled"
             + ("; one call is as good here, for half the calls: --stages 1" if as_good else "")]
    return "\n".join(text + [f"{who}, {WAYS[config.stages]}: {verdict(rows, config.stages)}"])


def cost_lines(row, stages, config):
    """What a question costs, and all questions of a run on the task's schedule."""
    if not row["questions"]:
        return ["cost: nothing was asked"]
    sessions = 1 + max(0, config.total_steps - config.explore_steps) // config.feedback_every
    pairs = min(config.max_pairs, sessions * config.pairs_per_session)
    hours = "all of it from the cache" if np.isnan(row["seconds"]) else (
        f"{row['seconds']:.2f} s; a run: {row['seconds'] * pairs / config.workers / 3600:.2f} h of waiting for answers")
    money = "unknown: give --usd-per-mtok IN,OUT" if row["usd"] is None else (
        f"${row['usd']:.5f}; a run: ${row['usd'] * pairs:.2f}")
    return [f"a pair: {row['tokens_in']:.0f} tokens in, {row['tokens_out']:.0f} out; a run of {config.total_steps:,} "
            f"steps: {pairs:,} pairs, {stages * pairs:,} calls, {pairs * (row['tokens_in'] + row['tokens_out']):,.0f} "
            "tokens", f"time for a pair: {hours}", f"price of a pair: {money}"]


def draw(path, rows, config):
    """audit.png: what came of the questions in each bin, a panel for each way -> its path, or a line why not."""
    try:
        import matplotlib
    except ImportError:  # the answers are paid for: the tables must not end for want of a drawing
        return "no audit.png, for it needs matplotlib: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ("#2a9d4e", "#c0392b", "#b0b0b0", "#e09030", "#303030")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")  # inches
    for panel, (stages, way) in zip(panels, WAYS.items()):
        bins = [row for row in rows if row["stages"] == stages][: len(BINS) - 1]
        names = [f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %" for row in bins]
        base = np.zeros(len(bins))
        for kind, colour in zip(KINDS, colours):  # the last kind, "limit", was not asked
            part = np.array([share(row[kind.replace(" ", "_")], row["questions"]) for row in bins])
            panel.bar(names, part, bottom=base, color=colour, label=kind)
            base += np.nan_to_num(part)
        row = of(rows, stages, 0.0)
        panel.set_title(f"{way}: picks the first image {percent(row['first_share'])},\nthe same in both orders "
                        f"{percent(row['consistent'])}", fontsize=10)
        panel.set_xlabel("difference in true progress, share of its range")
    panels[0].set_ylabel("share of the questions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    who = settings.who_labels(config)
    figure.suptitle(f"{config.env}, labels from: {who}\n{verdict(rows, config.stages)}", fontsize=10, wrap=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


# ---- the script ----
def audit(config, pairs=100, policy=None):
    """Draw, ask, sum up, write the folder -> {"verdict": one line, "rows": of audit.csv, "text", "folder", "image"}."""
    if pairs < 1:
        raise settings.UserError(f"--pairs {pairs}: at least one pair")
    if config.resume or config.labels != "vlm" or config.reward not in settings.FROM_PAIRS:
        raise settings.UserError("an audit asks a VLM to compare images: leave out --resume, --labels and --reward")
    if config.out is None:
        name = f"audit-{config.env}-{config.vlm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = dataclasses.replace(config, out=os.path.join("runs", name.replace("/", "_").replace(":", "_")))
    if os.path.exists(config.out):
        raise settings.UserError(f"{config.out} exists already; choose another --out, and what was answered before is "
                                 "found in the vlm_cache beside it")
    config, env, _ = prepare(config)
    rng = np.random.default_rng(config.seed)
    labeler = make_labeler(config)  # before the folder is made: a wrong key or an unknown goal leaves nothing behind
    try:
        images, progress, kinds = collect(config, env, policy, rng)
        chosen, gap = draw_pairs(images, progress, pairs, rng)
        os.makedirs(config.out)
        write_json(os.path.join(config.out, "config.json"), {
            **dataclasses.asdict(config), "labeler": settings.who_labels(config), "pairs": len(chosen),
            "policy": policy})
        records = ask_all(config, labeler, images, progress, chosen, gap)
    finally:
        labeler.close()
    rows = summaries(records, settings.price_of(config))
    text = describe(rows, config, kinds)
    with open(os.path.join(config.out, "audit.txt"), "w") as file:
        file.write(text + "\n")
    with open(os.path.join(config.out, "audit.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, ["labeler", "env", *rows[0]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({"labeler": settings.who_labels(config), "env": config.env, **numbers})
    image = draw(os.path.join(config.out, "audit.png"), rows, config)
    return {"verdict": verdict(rows, config.stages), "rows": rows, "text": text, "folder": config.out, "image": image}


def parse_args(arguments):
    """The shell's flags -> (Config, pairs, policy). Every flag of train.py means here what it means there."""

    def fail(message):
        raise settings.UserError(message)

    parser = argparse.ArgumentParser(prog="python -m tools.audit_vlm", allow_abbrev=False,
                                     description=(__doc__ or "").partition("\n")[0],
                                     epilog="Also every flag of train.py: see python train.py --help. Those of the "
                                            "schedule change nothing but the projected cost of a run.")
    parser.error = fail
    parser.add_argument("--pairs", type=int, default=100, help="pairs to ask, each four times (default: 100)")
    parser.add_argument("--policy", help="a run folder of train.py, whose policy is the half-trained one")
    own, others = parser.parse_known_args(arguments)
    try:
        return settings.parse_args(others), own.pairs, own.policy
    except settings.UserError as error:
        more = ", --pairs, --policy" if "unrecognized" in str(error) else ""
        raise settings.UserError(f"{error}{more}") from None


def main(arguments=None):
    import vlm_query

    try:
        result = audit(*parse_args(sys.argv[1:] if arguments is None else arguments))
    except (settings.UserError, vlm_query.VLMError) as error:
        print(f"audit_vlm.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("audit_vlm.py: interrupted; all answers so far are kept: the same command with another --out goes on",
              file=sys.stderr)
        return 2
    print(f"{result['text']}\n{result['image']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
