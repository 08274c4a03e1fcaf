"""A reward learned from scores: how far has each picture come, from 0 to 1?

What this is: VLM Score, the baseline that RL-VLM-F is measured against: the VLM is shown one
picture, not two, and writes a number; the same ensemble of CNNs is fitted to the numbers.
Which STEPs: 4 fit the reward model to the answers, in its place:
    loss = mean of (r - (2 score - 1))^2          r in (-1, 1), score in [0, 1]

Differs from the paper: networks and epochs are those of RL-VLM-F here; a fit also ends at a
mean loss below 0.01.

Shapes: B batch, M pictures (M, H, W, 3) uint8, scores (M,) in [0, 1]. Needs reward_model.py.
  score_loss, ScoreDataset, fit(model, data, epochs). model: the RewardModel of reward_model.py.

To use it elsewhere:
    import numpy as np, reward_model
    from support import score_reward
    images = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    images //= np.arange(1, 5, dtype=np.uint8).repeat(16)[:, None, None, None]
    data = score_reward.ScoreDataset(64, (64, 64, 3))
    data.add(images, None, images.mean((1, 2, 3)) / 255)
    model = reward_model.RewardModel((64, 64, 3))
    print(score_reward.fit(model, data, epochs=5), model.predict(images).shape)
"""
import numpy as np
import torch

from reward_model import HOLD_OUT, as_input, check_pictures


def score_loss(r, score):
    """Squared error of the reward against the score, both on (-1, 1).

        loss = mean of (r - (2 score - 1))^2

    r: (B,) in (-1, 1).  score: (B,) in [0, 1].
    Example: r = 0, score 0.5 -> 0; r = 0, score 1 -> 1.
    """
    assert r.ndim == 1 and r.shape == score.shape, (r.shape, score.shape)
    return (r - (2 * score - 1)).square().mean()


class ScoreDataset:
    """A ring of scored pictures: image (N, H, W, 3) uint8, score (N,) in [0, 1]."""

    def __init__(self, capacity, image_shape):
        self.capacity, self.added = int(capacity), 0
        self.image = np.zeros((self.capacity, *image_shape), np.uint8)
        self.score = np.zeros(self.capacity, np.float32)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, images, _, scores):
        """images (M, H, W, 3) uint8, scores (M,); the second place is that of a pair's picture."""
        check_pictures(self.image, images, scores)
        if not ((np.asarray(scores) >= 0) & (np.asarray(scores) <= 1)).all():
            raise ValueError("scores must be in [0, 1]; leave out what has none")
        for image, score in zip(images, scores):
            row = self.added % self.capacity
            self.image[row], self.score[row] = image, score
            self.added += 1

    def rows(self, held_out=False):
        rows = np.arange(len(self))
        return rows[(rows % HOLD_OUT == HOLD_OUT - 1) == held_out]

    def state_dict(self):
        n = len(self)
        return {"added": self.added, "image": torch.from_numpy(self.image[:n].copy()),
                "score": torch.from_numpy(self.score[:n].copy())}

    def load_state_dict(self, state):
        self.added = state["added"]
        self.image[: len(self)], self.score[: len(self)] = state["image"], state["score"]


# ---- STEP 4: fit the reward model to the answers ----
def fit(model, data, epochs, stop_loss=0.01):
    """Fit the model's networks to all scores -> dict(loss, heldout_accuracy, epochs).

    Stops after an epoch whose mean loss was below stop_loss: 0.05 of the range from 0 to 1.
    heldout_accuracy: share of the pairs of held-out pictures that are ordered as their scores are.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    if len(data.rows()) == 0:
        raise ValueError("no scores to fit: every picture was unreadable or unanswered")
    model.fresh_networks()
    for epoch in range(1, epochs + 1):
        losses = []
        orders = [model.rng.permutation(data.rows()) for _ in model.nets]
        for start in range(0, len(orders[0]), 2 * model.batch):  # as many pictures as in pairs
            model.optimizer.zero_grad(set_to_none=True)
            for net, order in zip(model.nets, orders):
                part = order[start : start + 2 * model.batch]  # (B,)
                score = torch.from_numpy(data.score[part]).to(model.device)
                images = model.views(data.image[part])
                with model.precision():
                    reward = net(as_input(images, model.device, model.dtype))
                loss = score_loss(reward, score)
                loss.backward()
                losses.append(float(loss.detach()))
            model.optimizer.step()
        if np.mean(losses) < stop_loss:
            break
    model.standardise(data.image[: len(data)])
    return {"loss": float(np.mean(losses)), "epochs": epoch,
            "heldout_accuracy": order_accuracy(model, data)}


def order_accuracy(model, data):
    """Share of pairs of held-out pictures in the order of their scores; nan if there are none."""
    rows = data.rows(held_out=True)
    reward, score = model.predict(data.image[rows]), data.score[rows]  # (H,) each
    apart = score[:, None] > score[None, :]  # (H, H): the first is better than the second
    agree = reward[:, None] > reward[None, :]
    return float(agree[apart].mean()) if apart.any() else float("nan")


def demo():
    """Learn "the pole should stand upright" from 200 scored pictures; then order unseen ones."""
    import reward_model

    rng = np.random.default_rng(0)
    images, angle = reward_model.demo_pictures(600, rng)
    data = ScoreDataset(200, images.shape[1:])
    data.add(images[:200], None, 1 - np.abs(angle[:200]) / 45)
    model = reward_model.RewardModel(images.shape[1:])
    print({key: round(value, 3) for key, value in fit(model, data, epochs=30).items()})
    reward, truth = model.predict(images[200:]), -np.abs(angle[200:])
    right = ((reward[:, None] > reward) == (truth[:, None] > truth))[truth[:, None] != truth]
    print(f"unseen pairs ordered correctly: {right.mean():.1%} (expected: above 90%)")
    return float(right.mean())


if __name__ == "__main__":
    demo()
