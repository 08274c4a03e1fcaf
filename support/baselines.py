"""What RL-VLM-F is measured against: VLM Score, CLIP as reward, and the paper's own way to fit a reward model.

What this is:
  VLM Score   (`--reward score`) the VLM is shown one image, not two, and writes a number. The same ensemble of CNNs is
              fitted to the numbers:  loss = mean of (r - (2 score - 1))^2,   r in (-1, 1), score in [0, 1]
  CLIP        (`--reward clip`) a frozen CLIP says how well an image fits a sentence; nobody is asked and nothing is
              fitted. With alpha > 0 it is VLM-RM's goal-baseline regularisation (Rocamonde et al., arXiv 2310.12921).
              With x, g
              and b the embeddings, of unit length, of the image, of the goal ("the drawer is open") and of a baseline
              ("a drawer"):
                  CLIP score:  r = <x, g>                      VLM-RM:  r = 1 - |P(x - g)|^2 / 2
                  P = alpha L + (1 - alpha) I,   where L projects onto the line through b and g.  alpha = 0: exactly the
                  CLIP score; alpha = 1: only what moves the image from baseline to goal counts.
              The goal is a sentence about a state, not an order: "the pole is upright", not "to balance the pole".
  The paper's fit  (`--schedule paper`) without what "Differs" 1 and 3 to 5 of reward_model.py add.
Which STEPs: 4 fit the reward model to the answers; CLIP stands in place of STEPs 2 to 5.

Differs from the paper:
  1. VLM Score: networks and epochs are those of RL-VLM-F here; a fit also ends at a mean loss below 0.01.
  2. RL-VLM-F scales its CLIP score by 2 r - 1; where nothing terminates, as in its tasks, the best policy is that of
  both.
  3. The default is a small CLIP that two CPU cores can run; VLM-RM found that larger ones judge much better.

Shapes: M or N images (N, H, W, 3) uint8; scores (M,) in [0, 1]; embeddings (N, D) float32 of unit length; rewards (N,).
Names: score_loss, ScoreDataset, ScoreFit, PaperFit; cosine_reward, goal_baseline_reward, preprocess, ClipReward.
Needs reward_model.py; ClipReward also transformers (pip install transformers), with a model that is fetched once or
stands in a folder.

To use it elsewhere (beside reward_model.py):
    import numpy as np
    from reward_model import RewardModel
    from support.baselines import ScoreDataset, ScoreFit
    class ScoreModel(ScoreFit, RewardModel):
        pass
    images = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    images //= np.arange(1, 5, dtype=np.uint8).repeat(16)[:, None, None, None]
    data, model = ScoreDataset(64, (64, 64, 3)), ScoreModel((64, 64, 3))
    data.add(images, None, images.mean((1, 2, 3)) / 255)
    print(model.fit(data, epochs=5), model.predict(images).shape)
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F

from reward_model import HOLD_OUT, check_images


# ---- the paper's own fit ----
class PaperFit:
    """Mix into RewardModel: beta = 1, no normalisation, no held-out answers, networks that go on from the last fit."""

    beta, normalise = 1.0, False

    def fit(self, data, epochs, stop_accuracy=0.97):
        """As RewardModel.fit(), but the held-out answers are only reported and predict() is not standardised."""
        if epochs < 1 or not len(data.rows()):
            raise ValueError(f"{epochs} epochs over {len(data.rows())} answers: a fit needs at least one of each")
        for epoch in range(1, epochs + 1):
            loss, accuracy = self.one_epoch(data)
            if accuracy > stop_accuracy:
                break
        return {"loss": loss, "train_accuracy": accuracy, "epochs": epoch,
                "heldout_accuracy": self.accuracy(data, held_out=True)}


# ---- VLM Score: how far has each image come, from 0 to 1? ----
def score_loss(r, score):
    """Squared error of the reward against the score, both on (-1, 1).

        loss = mean of (r - (2 score - 1))^2

    r: (B,) in (-1, 1).  score: (B,) in [0, 1].
    Example: r = 0, score 0.5 -> 0; r = 0, score 1 -> 1.
    """
    assert r.ndim == 1 and r.shape == score.shape, (r.shape, score.shape)
    return (r - (2 * score - 1)).square().mean()


class ScoreDataset:
    """A ring of scored images: image (N, H, W, 3) uint8, score (N,) in [0, 1]."""

    def __init__(self, capacity, image_shape):
        self.capacity, self.added = int(capacity), 0
        self.image = np.zeros((self.capacity, *image_shape), np.uint8)
        self.score = np.zeros(self.capacity, np.float32)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, images, _, scores):
        """images (M, H, W, 3) uint8, scores (M,); the second place is that of a pair's image."""
        check_images(self.image, images, scores)
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


class ScoreFit:
    """Mix into RewardModel: fit() takes a ScoreDataset."""

    def fit(self, data, epochs, stop_loss=0.01):
        """Fit the networks to all scores -> dict(loss, heldout_accuracy, epochs).

        Stops after an epoch whose mean loss was below stop_loss: 0.05 of the range from 0 to 1.
        heldout_accuracy: share of the pairs of held-out images that are ordered as their scores are.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if len(data.rows()) == 0:
            raise ValueError("no scores to fit: every image was unreadable or unanswered")
        self.fresh_networks()
        for epoch in range(1, epochs + 1):
            losses = []
            orders = [self.rng.permutation(data.rows()) for _ in self.nets]
            for start in range(0, len(orders[0]), 2 * self.batch):  # as many images as in pairs
                self.optimizer.zero_grad(set_to_none=True)
                for net, order in zip(self.nets, orders):
                    part = order[start : start + 2 * self.batch]  # (B,)
                    score = torch.from_numpy(data.score[part]).to(self.device)
                    loss = score_loss(self.rewards(net, self.augment(data.image[part])), score)
                    loss.backward()
                    losses.append(float(loss.detach()))
                self.optimizer.step()
            if np.mean(losses) < stop_loss:
                break
        self.standardise(data.image[: len(data)])
        return {"loss": float(np.mean(losses)), "epochs": epoch, "heldout_accuracy": order_accuracy(self, data)}


def order_accuracy(model, data):
    """Share of pairs of held-out images in the order of their scores; nan if there are none."""
    rows = data.rows(held_out=True)
    reward, score = model.predict(data.image[rows]), data.score[rows]  # (H,) each
    apart = score[:, None] > score[None, :]  # (H, H): the first is better than the second
    agree = reward[:, None] > reward[None, :]
    return float(agree[apart].mean()) if apart.any() else float("nan")


# ---- CLIP: how well does an image fit a sentence? ----
MODEL = "openai/clip-vit-base-patch32"  # 150 million parameters, 0.6 GB; about 0.1 s of one core for a image
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


class ClipError(Exception):
    """No CLIP here: one line why, and the cure."""


def cosine_reward(x, goal):
    """CLIP score: the cosine of image and sentence.

        r = <x, g>,   |x| = |g| = 1

    x: (N, D) images.  goal: (D,).  -> (N,)
    Example: x = g -> 1; x at a right angle to g -> 0.
    """
    return x @ goal


def goal_baseline_reward(x, goal, baseline, alpha):
    """VLM-RM: the same with part of what is beside the line from baseline to goal taken out.

        u = (g - b) / |g - b|,   P v = alpha <v, u> u + (1 - alpha) v,   r = 1 - |P(x - g)|^2 / 2

    x: (N, D).  goal, baseline: (D,), all of unit length.  alpha: 0 (the cosine) to 1 (the line alone).  -> (N,)
    Example: alpha = 0 -> <x, g>, for |x - g|^2 = 2 - 2 <x, g>;  x = g -> 1 whatever alpha is.
    """
    line = F.normalize(goal - baseline, dim=0)  # (D,) u
    apart = x - goal  # (N, D); the line goes through g, so projecting x and then subtracting g is the same
    projected = alpha * (apart @ line)[:, None] * line + (1 - alpha) * apart  # (N, D)
    return 1 - projected.square().sum(-1) / 2


def preprocess(images, size):
    """(N, H, W, 3) uint8 -> (N, 3, size, size) float as CLIP knows it: short side to `size`, centre, normalised."""
    assert images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8, (images.shape, images.dtype)
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    shape = [size * side // min(x.shape[2:]) for side in x.shape[2:]]
    # trap: bicubic overshoots at edges; bytes are cut off at 0 and 255, as in CLIP's training, floats would not be
    x = F.interpolate(x, shape, mode="bicubic", antialias=True).float() / 255
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    x = x[:, :, top : top + size, left : left + size]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class ClipReward:
    """A frozen CLIP as reward: predict((N, H, W, 3) uint8) -> (N,) float32.

    goal_text: a state in words.  baseline_text: the same scene with nothing achieved; needed when alpha > 0.
    model: a name on the Hugging Face hub, or a folder with config.json, weights and tokenizer (save_pretrained's).
    """

    def __init__(self, goal_text, baseline_text=None, alpha=0.0, model=MODEL, device="cpu"):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share, 0 to 1, not {alpha}")
        if alpha > 0 and not baseline_text:
            raise ValueError("alpha > 0 needs a line from a baseline to the goal: give a baseline_text, as 'a drawer'")
        self.alpha, self.device = alpha, torch.device(device)
        self.clip, self.tokenizer = load(model)
        self.clip.to(self.device).eval().requires_grad_(False)
        self.size = self.clip.config.vision_config.image_size  # px, 224 or 336
        texts = [goal_text, baseline_text or goal_text]
        self.goal, self.baseline = self.embed_text(texts)  # (D,) each
        if alpha > 0 and torch.allclose(self.goal, self.baseline, atol=1e-6):
            raise ValueError(f"goal and baseline are the same to this CLIP: {texts}")

    @torch.no_grad()
    def embed_text(self, texts):
        """list of M sentences -> (M, D) unit vectors."""
        length = self.clip.config.text_config.max_position_embeddings  # 77 tokens; the rest of a sentence is not read
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        hidden = self.clip.text_model(tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device))
        return F.normalize(self.clip.text_projection(hidden.pooler_output), dim=-1)

    @torch.no_grad()
    def embed_images(self, images, chunk=32):
        """(N, H, W, 3) uint8 -> (N, D) unit vectors."""
        parts = [torch.zeros(0, len(self.goal), device=self.device)]
        for start in range(0, len(images), chunk):
            pixels = preprocess(images[start : start + chunk], self.size).to(self.device)  # (B, 3, S, S)
            hidden = self.clip.vision_model(pixels).pooler_output
            parts.append(F.normalize(self.clip.visual_projection(hidden), dim=-1))
        return torch.cat(parts)

    def predict(self, images):
        """(N, H, W, 3) uint8 -> (N,) float32."""
        x = self.embed_images(images)
        reward = goal_baseline_reward(x, self.goal, self.baseline, self.alpha) if self.alpha else \
            cosine_reward(x, self.goal)
        return reward.cpu().numpy().astype(np.float32)


def load(model):
    """A hub name or a folder -> (CLIPModel, its tokenizer), or ClipError."""
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError:
        raise ClipError("CLIP needs transformers: pip install transformers") from None
    try:
        clip, info = CLIPModel.from_pretrained(model, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
        # trap: what a folder lacks, transformers makes up: random weights, an empty vocabulary
        if info["missing_keys"]:
            raise ValueError(f"it lacks {len(info['missing_keys'])} of CLIP's weights")
        if tokenizer("the pole")["input_ids"] == tokenizer("a drawer")["input_ids"]:
            raise ValueError("its tokenizer tells no words apart")
        return clip, tokenizer
    except Exception as error:  # files that are cut short or of another model may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClipError(f"no CLIP model {model!r} ({reason}); name one on the Hugging Face hub, such as {MODEL}, or, "
                        "without a network, a folder with its config.json, model.safetensors and tokenizer") from None


def main(arguments):
    """python -m support.baselines "the pole is upright" image.png ... -> the reward of each."""
    if len(arguments) < 2:
        print('usage: python -m support.baselines "the pole is upright" image.png ...', file=sys.stderr)
        return 2
    import imageio.v3 as iio

    try:
        images = [iio.imread(path, index=0, mode="RGB")[None] for path in arguments[1:]]
        reward = ClipReward(arguments[0])
    except Exception as error:  # no such file, no image, no CLIP: every decoder has errors of its own
        print(f"baselines.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path, image in zip(arguments[1:], images):
        print(f"{reward.predict(image)[0]:.4f}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
