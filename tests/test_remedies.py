"""What helps against a judge that leans: the intercept, both orders, the order of pairs; and success with a potential."""
import json
import types

import numpy as np
import pytest

import reward_model
from sac import ReplayBuffer
from support import cached_labels, judges
from support.labeler import Labeler
from support.shaped import PotentialBuffer
from support.settings import Config, UserError, resolve


# ---- the intercept ----
def test_the_intercept_takes_up_what_the_vlm_leans():
    """Half of the answers are "the second" whatever is shown. With b the reward is left with the images' part."""
    rng = np.random.default_rng(0)
    images, angle = reward_model.demo_images(300, rng)
    pairs = reward_model.sample_pairs(images, 300, rng)
    right = (abs(angle[pairs[:, 1]]) < abs(angle[pairs[:, 0]])).astype(int)
    label = np.where(rng.random(300) < 0.5, 1, right)
    data = reward_model.PreferenceDataset(300, images.shape[1:])
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], label)
    found = {}
    for intercept in (True, False):
        model = reward_model.RewardModel(images.shape[1:], ensemble_size=1, lr=1e-3, intercept=intercept)
        fit = model.fit(data, epochs=8)
        found[intercept] = fit["lean"]
        assert model.predict(images).shape == (300,)
    assert found[True] > 0.7 and found[False] == 0.0


def test_a_label_between_0_and_1_costs_least_where_p_is_that_label():
    loss = reward_model.preference_loss
    import torch

    r1 = torch.linspace(-4, 4, 801)
    costs = torch.stack([loss(torch.zeros(1), r[None], torch.tensor([0.8])) for r in r1])
    assert torch.sigmoid(r1[costs.argmin()]).item() == pytest.approx(0.8, abs=0.01)
    assert loss(torch.zeros(1), torch.ones(1), torch.ones(1), lean=-1.0).item() == pytest.approx(np.log(2))


def test_labels_outside_0_to_1_are_no_labels():
    data, images = reward_model.PreferenceDataset(4, (47, 47, 3)), np.zeros((1, 47, 47, 3), np.uint8)
    data.add(images, images, [0.3])
    for label in (-1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            data.add(images, images, [label])


@pytest.mark.parametrize("how", reward_model.SAMPLERS)
def test_the_order_of_a_pair_is_random_in_every_sampler(how):
    """A VLM that leans to one side must not always meet the better image, or the rarer one, on that side."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60, dtype=np.uint8) * 4, 47 * 47 * 3).reshape(60, 47, 47, 3)  # brighter and brighter
    images[:40] = images[:40] // 40 + 100  # most of them look nearly alike
    bright = images.mean((1, 2, 3))
    model = types.SimpleNamespace(predict=lambda x: x.mean((1, 2, 3)), beta=1.0,
                                  member_rewards=lambda x: np.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3)) ** 2]) / 99)
    pairs = np.concatenate([reward_model.sample_pairs(images, 50, rng, how, model) for _ in range(40)])
    first, second = bright[pairs[:, 0]], bright[pairs[:, 1]]
    rare = (pairs >= 40) @ [1, -1]  # 1: only the first is a rare one, -1: only the second
    for better in ((first > second)[first != second], (rare > 0)[rare != 0]):
        assert len(better) > 300 and abs(better.mean() - 0.5) < 4 * 0.5 / len(better) ** 0.5


# ---- both orders ----
class Images:
    """As much of an ImageBuffer as a Labeler reads."""

    def __init__(self, n=12):
        self.large = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(50, 1).repeat(50, 2).repeat(3, 3) * 20
        self.small, self.progress = self.large[:, :47, :47], np.arange(n, dtype=float)

    def __len__(self):
        return len(self.progress)


def a_labeler(folder, judge, **settings):
    (folder / "pairs").mkdir()
    labeler = Labeler("to count", judge=judges.make(judge), both_orders=True, **settings)
    labeler.folder = str(folder / "pairs")
    labeler.log = types.SimpleNamespace(append=lambda record: (folder / "labels.jsonl").open("a").write(
        json.dumps(record) + "\n"))
    return labeler


def test_both_orders_drop_what_a_vlm_says_whatever_it_is_shown(tmp_path):
    pairs = np.array([[0, 11], [7, 2], [3, 4], [5, 4]])
    (tmp_path / "stuck").mkdir(), (tmp_path / "sure").mkdir()
    stuck = a_labeler(tmp_path / "stuck", {"judge": "stuck"})
    first, second, y = stuck(Images(), pairs, 1, np.random.default_rng(0))
    assert len(y) == 0 and (stuck.counts["asked"], stuck.counts["contradicted"], stuck.counts["labels"]) == (8, 4, 0)

    sure = a_labeler(tmp_path / "sure", {"slope": 50.0, "lean": 8.0, "spread": 0.0, "jitter": 0.0}, max_pairs=11)
    first, second, y = sure(Images(), pairs, 1, np.random.default_rng(0))
    assert y.tolist() == [1, 0]  # the lean decides where the difference is one of eleven
    assert (sure.counts["asked"], sure.counts["contradicted"], sure.counts["labels"]) == (8, 2, 2)
    assert (first[:, 0, 0, 0].tolist(), second[:, 0, 0, 0].tolist()) == ([0, 140], [220, 40])
    assert sure.accuracy() == 1 and sure.room(100) == 1  # 3 questions are left: one pair
    records = [json.loads(line) for line in open(tmp_path / "sure" / "labels.jsonl")]
    assert [record.get("turns_round") for record in records] == [None, 0, None, 2, None, 4, None, 6]
    assert [record["label"] for record in records] == [1, 0, 0, 1, 1, 1, 1, 1]
    # whoever reads the answers later gets the same labels
    kept = cached_labels.read_log(str(tmp_path / "sure" / "labels.jsonl"))
    assert [(path[-10:], label) for path, label in kept] == [("000000.png", 1), ("000002.png", 0)]


def test_both_orders_need_pairs():
    with pytest.raises(UserError, match="asks about no pairs"):
        resolve(Config(env="CartPole", reward="score", both_orders=1))


# ---- success as the reward, the learned reward as its potential ----
def test_potentials_cancel_over_an_episode_and_only_success_is_left():
    rng, discount = np.random.default_rng(0), 0.9
    B = PotentialBuffer(40, (2,), (1,), (47, 47, 3), discount=discount)
    assert isinstance(B, ReplayBuffer)
    potential, image = lambda images: images[:, 0, 0, 0].astype(np.float32), np.zeros((47, 47, 3), np.uint8)
    episodes = []
    for length, ends in ((5, True), (7, False), (4, True)):
        obs, rows = rng.normal(size=2), []
        for t in range(length):
            following, success = rng.normal(size=2), float(t == length - 1)
            rows.append(B.added)
            B.add(obs, [0.0], following, ends and t == length - 1, image + rng.integers(0, 255, dtype=np.uint8), success)
            obs = following
        episodes.append((rows, ends))
        B.relabel(potential, only_new=True)
    one_by_one = B.reward.copy()
    assert B.relabel(potential) == 16
    assert np.array_equal(one_by_one[:16], B.reward[:16])  # all at once, or as they came
    for rows, ends in episodes:
        weights = discount ** np.arange(len(rows))
        last = 0 if ends else discount ** len(rows) * potential(B.image[rows[-1:]])[0]
        assert (weights * B.reward[rows]).sum() == pytest.approx((weights * B.true_reward[rows]).sum() + last, rel=1e-4)
    B.relabel(lambda images: 0 * potential(images))
    assert np.array_equal(B.reward[:16], B.true_reward[:16])
