"""The baselines (support/baselines.py): scores of single images, CLIP, the paper's own fit."""
import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reward_model
from support import baselines


class ScoreModel(baselines.ScoreFit, reward_model.RewardModel):
    pass


def test_score_loss_is_the_squared_error_on_the_scale_of_the_reward():
    """Scores 0, 1/2, 1 must pull towards -1, 0, 1; the documented examples must hold."""
    loss = baselines.score_loss(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 1.0]))
    assert float(loss) == pytest.approx(1 / 3)


def test_a_model_fitted_to_scores_orders_unseen_images_and_goes_on_identically():
    """200 scored poles must teach the order of unseen ones; every eighth only measures; a saved state must go on alike."""
    images, angle = reward_model.demo_images(300, np.random.default_rng(0))
    data, model = baselines.ScoreDataset(200, (64, 64, 3)), ScoreModel((64, 64, 3))
    data.add(images[:200], None, 1 - np.abs(angle[:200]) / 45)
    model.fit(data, epochs=30)
    reward, truth = model.predict(images[200:]), -np.abs(angle[200:])
    right = ((reward[:, None] > reward) == (truth[:, None] > truth))[truth[:, None] != truth]
    assert right.mean() > 0.9
    images, angle = reward_model.demo_images(24, np.random.default_rng(0))
    data = [baselines.ScoreDataset(16, (64, 64, 3)) for _ in range(2)]
    data[0].add(images, None, 1 - np.abs(angle) / 45)
    assert len(data[0]) == 16 and set(data[0].rows(held_out=True)) == {7, 15}
    assert np.allclose(data[0].score[:8], 1 - np.abs(angle[16:]) / 45)  # the ring went round
    data[1].load_state_dict(data[0].state_dict())
    fits = [ScoreModel((64, 64, 3)).fit(each, epochs=2) for each in data]
    assert fits[0] == fits[1] and fits[0]["epochs"] == 2
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        data[0].add(images[:1], None, [1.5])
    with pytest.raises(ValueError, match="no scores to fit"):
        ScoreModel((64, 64, 3)).fit(baselines.ScoreDataset(4, (64, 64, 3)), 1)


def unit_vectors(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_goal_baseline_regularisation_without_alpha_is_the_clip_score():
    """With alpha = 0 VLM-RM's reward must equal the cosine; with x = g it must be 1 for every alpha."""
    x, (goal, baseline) = unit_vectors(6, 8), unit_vectors(2, 8)
    plain = baselines.goal_baseline_reward(x, goal, baseline, 0.0)
    assert torch.allclose(plain, baselines.cosine_reward(x, goal), atol=1e-6)
    for alpha in (0.0, 0.3, 1.0):
        assert torch.allclose(baselines.goal_baseline_reward(goal[None], goal, baseline, alpha), torch.ones(1))


def test_goal_baseline_regularisation_is_the_paper_s_projection_matrix():
    """The reward must be 1 - |P(x - g)|^2 / 2 with P = alpha u u^T + (1 - alpha) I, written out as matrices."""
    x, (goal, baseline) = unit_vectors(6, 8), unit_vectors(2, 8)
    line = (goal - baseline)[:, None]
    matrix = 0.7 * line @ line.T / (line.T @ line) + 0.3 * torch.eye(8)
    expected = 1 - ((x - goal) @ matrix).square().sum(1) / 2
    assert torch.allclose(baselines.goal_baseline_reward(x, goal, baseline, 0.7), expected, atol=1e-6)


def test_with_alpha_one_only_the_way_from_baseline_to_goal_counts():
    """What is at a right angle to the line must change nothing; half-way along it the loss is a quarter of the whole."""
    goal, baseline, aside = torch.eye(3)[0], -torch.eye(3)[0], torch.eye(3)[1]
    x = torch.stack([baseline, torch.zeros(3), torch.zeros(3) + 5 * aside, goal])
    reward = baselines.goal_baseline_reward(x, goal, baseline, 1.0)
    assert reward.tolist() == [-1.0, 0.5, 0.5, 1.0]


def test_clip_images_are_prepared_as_pillow_would_without_torchvision():
    """Resize, centre crop and normalisation must agree with PIL's bicubic to two grey levels, wide or tall."""
    y, x = np.mgrid[0:90, 0:150]
    image = np.stack([x % 256, y % 256, 255 * ((x // 15 + y // 15) % 2)], -1).astype(np.uint8)  # (90, 150, 3), edges
    for turned in (image, np.ascontiguousarray(image.transpose(1, 0, 2))):
        scaled = Image.fromarray(turned).resize([64 * side // 90 for side in turned.shape[1::-1]], Image.BICUBIC)
        left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
        expected = np.asarray(scaled.crop((left, top, left + 64, top + 64))) / 255.0
        ours = baselines.preprocess(turned[None], 64)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours * baselines.STD + baselines.MEAN - expected).max() < 2.5 / 255


def test_clip_without_transformers_or_model_says_the_cure_in_one_line(monkeypatch, tmp_path):
    """A missing package and a missing model must each be one line that says what to do."""
    with pytest.raises(ValueError, match="baseline_text"):
        baselines.ClipReward("the pole is upright", alpha=0.5)
    if importlib.util.find_spec("transformers"):
        with pytest.raises(baselines.ClipError, match="a folder with its config.json") as error:
            baselines.ClipReward("the pole is upright", model=str(tmp_path / "nothing"))
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(baselines.ClipError, match="pip install transformers"):
        baselines.ClipReward("the pole is upright")
