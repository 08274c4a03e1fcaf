"""Rewards from CLIP: how well a picture fits a sentence, without asking anybody and without training anything.

What this is: the baseline that RL-VLM-F is measured against (CLIP score), and VLM-RM's goal-baseline regularisation of
it (Rocamonde et al., arXiv 2310.12921). In place of STEPs 2 to 5: a frozen CLIP prices every picture. With x, g and b
the embeddings, of unit length, of the picture, of the goal ("the drawer is open") and of a baseline ("a drawer"):
    CLIP score:  r = <x, g>                      VLM-RM:  r = 1 - |P(x - g)|^2 / 2
    P = alpha L + (1 - alpha) I,   where L projects onto the line through b and g;   alpha = 0: exactly the CLIP score,
    alpha = 1: only what moves the picture from baseline to goal counts, and what is beside the matter does not.
The goal is a sentence about a state, not an order: "the pole is upright", not "to balance the pole".

Differs from the paper:
  1. RL-VLM-F scales its score by 2 r - 1; where nothing terminates, as in its tasks, the best policy is that of both.
  2. The default is a small CLIP that two CPU cores can run; VLM-RM found that larger ones judge much better.

Shapes: pictures (N, H, W, 3) uint8; embeddings (N, D) float32 of unit length; rewards (N,) float32, in (-1, 1] for
alpha = 0. Names: cosine_reward, goal_baseline_reward, preprocess, ClipReward.  Needs numpy and torch; ClipReward also
transformers (pip install transformers), with a model that is fetched once or stands in a folder.

To use it elsewhere:
    import torch
    from support import clip_reward
    x = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)  # any embeddings of pictures
    goal, baseline = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)  # and of two sentences
    print(clip_reward.goal_baseline_reward(x, goal, baseline, alpha=0.5))
    # with transformers: clip_reward.ClipReward("the pole is upright", "a pole", alpha=0.5).predict(pictures)
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F

MODEL = "openai/clip-vit-base-patch32"  # 150 million parameters, 0.6 GB; about 0.1 s of one core for a picture
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


class ClipError(Exception):
    """No CLIP here: one line why, and the cure."""


# ---- the equations ----
def cosine_reward(x, goal):
    """CLIP score: the cosine of picture and sentence.

        r = <x, g>,   |x| = |g| = 1

    x: (N, D) pictures.  goal: (D,).  -> (N,)
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


# ---- the reward ----
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
    """python -m support.clip_reward "the pole is upright" picture.png ... -> the reward of each."""
    if len(arguments) < 2:
        print('usage: python -m support.clip_reward "the pole is upright" picture.png ...', file=sys.stderr)
        return 2
    import imageio.v3 as iio

    try:
        pictures = [iio.imread(path, index=0, mode="RGB")[None] for path in arguments[1:]]
        reward = ClipReward(arguments[0])
    except Exception as error:  # no such file, no picture, no CLIP: every decoder has errors of its own
        print(f"clip_reward.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path, picture in zip(arguments[1:], pictures):
        print(f"{reward.predict(picture)[0]:.4f}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
