"""reward_model.py: what the lesson leaves out. Samplers, patience, the paper's fit, batches."""
import numpy as np
import pytest
from scipy.stats import spearmanr

import reward_model
from support import baselines
from test_components import numbered_images


def test_fresh_networks_are_those_of_a_new_model():
    """New weights, and an optimiser without memory: as if nothing had been fitted before."""
    images, angle = reward_model.demo_images(40, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(20, images.shape[1:])
    data.add(images[:20], images[20:], (abs(angle[20:]) < abs(angle[:20])).astype(int))
    used, new = (reward_model.RewardModel(images.shape[1:], seed=seed) for seed in (0, 1))
    used.fit(data, epochs=2)
    used.rng.bit_generator.state = new.rng.bit_generator.state
    assert used.fit(data, epochs=2) == new.fit(data, epochs=2)
    assert np.array_equal(used.predict(images), new.predict(images))


def test_predict_does_not_depend_on_how_images_are_batched(monkeypatch):
    """All at once, in chunks and one by one must give the same rewards."""
    images = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), np.uint8)
    model = reward_model.RewardModel((64, 64, 3))
    one_by_one = np.concatenate([model.predict(images[i : i + 1]) for i in range(10)])
    assert model.predict(images).dtype == np.float32
    assert np.allclose(model.predict(images), one_by_one, atol=1e-5)
    at_once = model.member_rewards(images)
    monkeypatch.setattr(reward_model, "PREDICT_BYTES", 3 * 4 * images[0].size)  # three pictures in float32
    assert np.allclose(model.member_rewards(images), at_once, atol=1e-5)


def test_half_of_the_best_pairs_are_among_the_best():
    """Of 50 pictures the ten with the highest reward must be asked about against each other in half of the pairs, and in no more."""
    images, rng = numbered_images(50), np.random.default_rng(0)

    class BrightIsGood:
        def predict(self, images):
            return images[:, 0, 0, 0].astype(np.float32)

    pairs = reward_model.sample_pairs(images, 200, rng, "best", BrightIsGood())
    assert (pairs >= 40).all(1).mean() == pytest.approx(0.5 + 0.5 * 0.2**2, abs=0.05)
    assert (pairs < 40).any(1).sum() > 80 and (pairs[:, 0] != pairs[:, 1]).all()


def test_a_rare_image_is_asked_about_however_little_it_is_held_for():
    """With "best", the one bright image of 100 must be in a pair although its predicted reward is the lowest."""
    images, rng = np.zeros((100, 64, 64, 3), np.uint8), np.random.default_rng(0)
    images[:, 0, 0] = np.arange(100)[:, None] % 3
    images[7] = 255

    class DarkIsGood:
        def predict(self, images):
            return -images.mean((1, 2, 3))

    for _ in range(20):
        pairs = reward_model.sample_pairs(images, 6, rng, "best", DarkIsGood())
        assert (pairs == 7).any() and len(pairs) == 6


def test_diverse_pairs_ask_about_rare_pictures_as_often_as_about_frequent_ones():
    """Four bright pictures among 96 nearly black ones are all there is to see: they must be in most pairs, on both sides."""
    images, rng = np.zeros((100, 64, 64, 3), np.uint8), np.random.default_rng(0)
    images[:, 0, 0] = np.arange(100)[:, None] % 3
    images[96:] = np.array([60, 120, 180, 240])[:, None, None, None]
    pairs = reward_model.sample_pairs(images, 5, rng, "diverse")
    assert (pairs >= 96).any(1).sum() >= 4 and len({*pairs[pairs >= 96]}) == 4
    many = np.concatenate([reward_model.sample_pairs(images, 5, rng, "diverse") for _ in range(20)])
    assert 0.3 < (many[:, 0] >= 96).mean() / (many >= 96).any(1).mean() < 0.7
    points = np.array([[0.0], [1], [2], [10], [11]])
    assert set(reward_model.k_centers(points, 2, rng)) in ({0, 4}, {1, 4}, {2, 4}, {3, 0}, {4, 0})


def test_too_few_images_and_unknown_samplers_are_named():
    """One picture makes no pair; a mistyped sampler must list those there are."""
    with pytest.raises(ValueError, match="two images"):
        reward_model.sample_pairs(numbered_images(1), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="uniform, disagreement"):
        reward_model.sample_pairs(numbered_images(3), 1, np.random.default_rng(0), "finest")


@pytest.mark.parametrize("first, second, label", [
    (np.ones((2, 8, 8, 3)), np.zeros((2, 8, 8, 3), np.uint8), [0, 1]), (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8), [0, 1]),
    (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), [0])])
def test_pictures_that_do_not_fit_their_answers_are_refused(first, second, label):
    """Floats would be stored as zeros, and what has no partner silently dropped: both data sets must say so."""
    data = reward_model.PreferenceDataset(4, (8, 8, 3))
    with pytest.raises(ValueError, match="images must be"):
        data.add(first, second, label)
    assert len(data) == 0
    with pytest.raises(ValueError, match="images must be"):
        baselines.ScoreDataset(4, (8, 8, 3)).add(first if first.dtype != np.uint8 else second, None, [0.5] * 3)


def test_wrong_answers_are_not_learned_by_heart():
    """With one answer in five wrong, the held-out answers must end the fit early, and the truth must come out of it."""
    rng = np.random.default_rng(1)
    images, angle = reward_model.demo_images(400, rng)
    pairs = reward_model.sample_pairs(images, 300, rng)
    better = np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])
    data = reward_model.PreferenceDataset(300, (64, 64, 3))
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], (better ^ (rng.random(300) < 0.2)).astype(int))
    models = [reward_model.RewardModel((64, 64, 3), ensemble_size=1, patience=patience) for patience in (3, 0)]
    epochs = [model.fit(data, 18)["epochs"] for model in models]
    unseen, angle = reward_model.demo_images(300, rng)
    listened, did_not = (spearmanr(model.predict(unseen), -np.abs(angle)).statistic for model in models)
    assert epochs[0] < epochs[1] - 5 and listened > 0.75 and listened > did_not + 0.05


def test_a_fit_reports_the_epoch_whose_networks_it_keeps(monkeypatch):
    """Where the second epoch surprises the held-out answers least, its loss and accuracy must be reported, not the last's."""
    model = reward_model.RewardModel((48, 48, 3), ensemble_size=1, patience=1)
    data = reward_model.PreferenceDataset(40, (48, 48, 3))
    data.add(np.zeros((40, 48, 48, 3), np.uint8), np.zeros((40, 48, 48, 3), np.uint8), [0, 1] * 20)
    epochs, surprises = iter([(0.3, 0.6), (0.2, 0.7), (0.1, 0.8), (0.05, 0.9)]), iter([2.0, 1.0, 1.5, 1.6])
    monkeypatch.setattr(model, "one_epoch", lambda data: next(epochs))
    monkeypatch.setattr(model, "heldout_loss", lambda data: next(surprises))
    fit = model.fit(data, 9)
    assert (fit["loss"], fit["train_accuracy"], fit["epochs"]) == (0.2, 0.7, 4)


@pytest.mark.parametrize("paper", (False, True))
def test_the_paper_s_fit_is_bounded_and_goes_on_where_ours_begins_afresh(paper):
    """P of the paper's tanh rewards cannot leave [0.12, 0.88], so its loss cannot pass 0.127; ours must. Ours refits new nets."""
    class PaperModel(baselines.PaperFit, reward_model.RewardModel):
        pass

    model = (PaperModel if paper else reward_model.RewardModel)((64, 64, 3), lr=1e-3, intercept=not paper)
    data = reward_model.PreferenceDataset(32, (64, 64, 3))
    data.add(numbered_images(32) * 0, numbered_images(32) * 0 + 250, [1] * 32)
    loss = model.fit(data, epochs=30, stop_accuracy=1)["loss"]
    assert loss > 0.126 if paper else loss < 0.05
    assert (model.mean == 0) == paper
    again = model.fit(data, epochs=1, stop_accuracy=1)["loss"]
    assert again < 0.14 if paper else again > 2 * loss


def test_a_saved_reward_model_goes_on_identically():
    """state_dict of model and data must hold everything that a further fit depends on."""
    images, angle = reward_model.demo_images(20, np.random.default_rng(0))
    models = [reward_model.RewardModel((64, 64, 3), seed=seed) for seed in (0, 1)]
    data = [reward_model.PreferenceDataset(10, (64, 64, 3)) for _ in models]
    data[0].add(images[:10], images[10:], (np.abs(angle[10:]) < np.abs(angle[:10])).astype(int))
    models[0].fit(data[0], epochs=1)
    data[1].load_state_dict(data[0].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].fit(data[0], epochs=2) == models[1].fit(data[1], epochs=2)
    assert np.array_equal(models[0].predict(images), models[1].predict(images))


def test_where_a_goal_has_no_left_and_right_a_picture_is_worth_what_its_mirror_image_is():
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    plain, mirroring = (reward_model.RewardModel((48, 48, 3), random_flip=mirror) for mirror in (False, True))
    assert np.allclose(mirroring.predict(images), mirroring.predict(images[:, :, ::-1]), atol=1e-5)
    halves = [plain.member_rewards(view) for view in (images, images[:, :, ::-1])]
    assert not np.allclose(*halves, atol=1e-5)
    assert np.allclose(mirroring.member_rewards(images), np.mean(halves, 0), atol=1e-5)


def test_answers_about_one_place_hold_at_another_if_pictures_are_shifted():
    """Fitted on longer bars at one place, the model must order bars elsewhere; unshifted, it does so less well."""
    def bars(n, corner):
        lengths, images = rng.permutation(n) * 20 // n + 4, np.zeros((n, 64, 64, 3), np.uint8)
        for image, length, (row, column) in zip(images, lengths, corner):
            image[row : row + 4, column : column + length] = 255
        return images, lengths

    surprise = []
    for shift in (0, 8):
        rng = np.random.default_rng(0)
        images, lengths = bars(120, [(30, 20)] * 120)
        data, model = reward_model.PreferenceDataset(60, (64, 64, 3)), reward_model.RewardModel((64, 64, 3), random_shift=shift)
        apart = lengths[:60] != lengths[60:]
        data.add(images[:60][apart], images[60:][apart], (lengths[60:] > lengths[:60])[apart].astype(int))
        model.fit(data, epochs=20)
        images, lengths = bars(120, rng.integers((22, 12), (39, 29), (120, 2)))
        surprise.append(1 - np.corrcoef(model.predict(images), lengths)[0, 1])
    assert surprise[1] < 0.5 * surprise[0]


def test_held_out_answers_judge_the_order_and_not_how_sure_a_network_is(monkeypatch):
    """Eight of ten in order must be better than nothing learned, however sure the networks are; half of ten must not be."""
    model = reward_model.RewardModel((48, 48, 3), ensemble_size=2)
    data = reward_model.PreferenceDataset(80, (48, 48, 3))
    data.add(np.zeros((80, 48, 48, 3), np.uint8), np.ones((80, 48, 48, 3), np.uint8), [1] * 80)  # ten are held out
    losses = []
    for right in (8, 5):
        second = np.where(np.arange(10) < right, 0.9, -0.9)
        monkeypatch.setattr(model, "member_rewards", lambda images: np.tile(
            np.where(images[:, 0, 0, 0] == 1, second, 0), (2, 1)).astype(np.float32))
        losses.append(model.heldout_loss(data))
    assert losses[0] < 0.6 and losses[1] == pytest.approx(np.log(2), abs=1e-6)


def test_few_answers_say_less_of_a_lean_than_many():
    """Of equal images, all answers "second": b must grow with their number, and be no more than the data say."""
    leans = []
    for count in (8, 64, 512):
        model = reward_model.RewardModel((48, 48, 3), ensemble_size=1, patience=0)
        data = reward_model.PreferenceDataset(count, (48, 48, 3))
        data.add(*[np.zeros((count, 48, 48, 3), np.uint8)] * 2, [1] * count)
        leans.append(model.fit(data, 200 * 16 // count + 1, stop_accuracy=1)["lean"])
    assert 0.2 < leans[0] < leans[1] - 0.3 and leans[1] < leans[2] - 0.3
