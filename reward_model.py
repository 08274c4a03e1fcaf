"""A reward learned from preferences: which of two images is closer to the goal?

What this is: r_psi, an ensemble of small CNNs r(image) -> (-1, 1). It is fitted to labels, 0 for "the first image is
closer to the goal" and 1 for "the second", with the Bradley-Terry model. Also here: I, the images that may be asked
about, and which pairs to ask.
Which STEPs: 2 pick pairs of images, 4 fit the reward model to the answers:

    P[second is better] = sigmoid(beta (r1 - r0) + b)        sigmoid(z) = 1 / (1 + exp(-z))
    loss = mean of -log P[the image that the label names]

Differs from the paper (RL-VLM-F, arXiv 2402.03681). PaperFit in support/baselines.py leaves out 3 to 6 and the early
stop of 1; there, too, one answer in eight is held out, but only for the log:
  1. One answer in eight is held out. A fit ends when the loss on these has not fallen for more than ten epochs, and
     goes back to the best epoch: real answers are partly wrong, and a network can learn wrong answers by heart.
  2. The networks see images of 64 to 100 pixels, the VLM 200 to 308. A gradient step takes 16 answers; 64 in the
     official code.
  3. Rewards are multiplied by beta = 10 in P. They are in (-1, 1), so with beta = 1, P cannot leave [0.12, 0.88]: the
     loss can then only fall by pushing rewards to -1 and 1, and all images near the goal get the same reward.
  4. There is a normalisation after each convolution, and every fit begins with fresh networks (1910.08475): a network
     that goes on from the last fit remembers the few answers of the beginning too well.
  5. predict() is standardised: mean 0 and deviation 1 over all images in D (1706.03741).
  6. b, one number for each member, is how far the VLM leans to the second image, whatever the two show. The paper has
     no b. Real VLMs do lean, and the lean is then not taken for a difference between images. The fewer answers there
     are, the more b is held at 0.
  7. A fit may move images at random (random_shift; 2004.13649) or flip them left to right (random_flip). One CNN serves
     all tasks (official code: ResNet-18 for rope, water and cloth), and pairs are drawn from images of the whole run.

Shapes: B batch, N images, M pairs, H and W pixels (at least 47). Images (N, H, W, 3) are uint8.
Needs numpy and torch only.
Names: ImageBuffer, sample_pairs, PreferenceDataset, preference_loss, RewardNet, RewardModel (fit, predict).

To use it elsewhere:
    import numpy as np, reward_model
    images = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    images[:, :32] //= 4  # a dark upper half; the goal here: brighter images
    pairs = reward_model.sample_pairs(images, 100, np.random.default_rng(1))  # (100, 2)
    first, second = images[pairs[:, 0]], images[pairs[:, 1]]
    data = reward_model.PreferenceDataset(100, (64, 64, 3))
    data.add(first, second, (second.mean((1, 2, 3)) > first.mean((1, 2, 3))).astype(int))
    model = reward_model.RewardModel((64, 64, 3))
    print(model.fit(data, epochs=3), model.predict(images).shape)
"""
import copy
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HOLD_OUT = 8  # every eighth answer only measures, and says when to stop
BETA = 10.0  # inverse temperature of Bradley-Terry: at a difference of one, P[second is better] is 0.9999; "Differs" 3
PREDICT_BYTES = 6 * 2**20  # bytes of images in one pass of predict(): among the fastest here, from 64 to 200 pixels
SURENESS = (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1)  # factors of the rewards in the loss on held-out answers
LEAN_PULL = 5.0  # how strongly b is held at 0: at b = 1, as strongly as five answers can pull at most
LEAN_LR = 0.03  # learning rate of b: every answer moves the same way this one number, so it may take larger steps
LAYERS = ((16, 5, 3), (32, 3, 2), (64, 3, 2), (128, 3, 2))  # channels, kernel, stride: the paper's CNN


# ---- STEP 2: pick pairs of images ----
class ImageBuffer:
    """I, the images that may be asked about: a reservoir, in which every image offered so far is equally likely to be.

    A run sees more images than it can keep at the VLM's size, so a random sample of them must do. An image that was
    offered before is not offered again: otherwise a pole that lies still would soon be half of all pairs.
    large (C, P, P, 3) what the VLM will see; small (C, S, S, 3) what the reward model sees; progress (C,) true
    progress,
    which only the books read (how many labels are right), and the oracle.
    """

    def __init__(self, capacity, large, small, array=None):
        """large, small: sides in pixels.  array(name, shape, dtype): makes the arrays, if not in memory."""
        array = array or (lambda name, shape, dtype: np.zeros(shape, dtype))
        self.capacity, self.offered = int(capacity), 0
        self.seen = set()  # checksums of all images ever offered
        self.progress = np.zeros(self.capacity, np.float32)
        self.large = array("query", (self.capacity, large, large, 3), np.uint8)
        self.small = array("query_small", (self.capacity, small, small, 3), np.uint8)

    def __len__(self):
        return min(self.offered, self.capacity)

    def offer(self, large, small, progress, rng):
        """Algorithm R (Vitter 1985): the n-th image replaces a random one with probability capacity / n."""
        checksum = zlib.crc32(small)
        if checksum in self.seen:
            return
        self.seen.add(checksum)
        row = self.offered if self.offered < self.capacity else int(rng.integers(0, self.offered + 1))
        self.offered += 1
        if row < self.capacity:
            self.large[row], self.small[row], self.progress[row] = large, small, progress

    def state_dict(self):
        return {"offered": self.offered, "progress": self.progress.tolist(), "seen": list(self.seen)}

    def load_state_dict(self, state):
        self.offered, self.progress[:], self.seen = state["offered"], state["progress"], set(state["seen"])


SAMPLERS = ("uniform", "disagreement", "entropy", "best", "diverse")


def sample_pairs(images, n_pairs, rng, how="uniform", model=None):
    """Choose which pairs to ask about -> (M, 2) rows of `images`; no row is paired with itself.

    images: (N, H, W, 3) uint8.  rng: numpy Generator.  how:
      uniform       any two images that are not equal, all equally likely (the paper's).
      disagreement  of ten times as many pairs, those on which the members' P[second is better] spreads most.
      entropy       of ten times as many pairs, those on which the ensemble's P[second is better] is closest to 1/2.
      best          every other pair from the fifth of the images with the highest predicted reward: what a policy does
                    at the end depends on the order near the goal. The others are diverse: an image of the goal that is
                    not held for good is not among the best, and rare.
      diverse       one image of each pair from a set that covers all there is to see (k-center), the other any: rare
                    images are asked about as often as frequent ones.
    model: RewardModel. best, disagreement and entropy need one; uniform stands in for them while there is none.
    Raises ValueError for fewer than two images, or an unknown name.
    """
    n = len(images)
    if n < 2:
        raise ValueError(f"a pair needs two images, and there {'is' if n == 1 else 'are'} {n}")
    if how not in SAMPLERS:
        raise ValueError(f"unknown sampler {how!r}; there are {', '.join(SAMPLERS)}")
    how = "uniform" if model is None and how != "diverse" else how
    tries = 10 * n_pairs
    pairs = (best_pairs(images, model.predict(images), n_pairs, tries, rng) if how == "best"
             else diverse_pairs(images, n_pairs, tries, rng) if how == "diverse"
             else uniform_pairs(n, tries, rng))
    worth = np.zeros(tries)
    if how in ("disagreement", "entropy"):
        rewards = model.member_rewards(images)  # (members, N)
        # P[second is better], (members, tries)
        p_second = 1 / (1 + np.exp(model.beta * (rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]])))
        worth = p_second.std(0) if how == "disagreement" else -np.abs(p_second.mean(0) - 0.5)
    same = np.array([np.array_equal(images[a], images[b]) for a, b in pairs])
    worth[same] = -np.inf  # two equal images teach nothing: they are taken only when there is nothing else
    return pairs[np.argsort(-worth, kind="stable")[:n_pairs]]


def uniform_pairs(n, n_pairs, rng):
    """(M, 2) numbers below n, never two equal ones in a pair."""
    first = rng.integers(0, n, n_pairs)
    # trap: a step of 1 to n - 1 around the ring reaches every other image, also the last one, and never the image
    # itself
    second = (first + rng.integers(1, n, n_pairs)) % n
    return np.stack([first, second], axis=1)


def best_pairs(images, predicted, n_pairs, tries, rng):
    """(tries, 2), tries even: from the fifth with the highest predicted reward (N,), and diverse ones, by turns."""
    best = np.argsort(-predicted, kind="stable")[:max(2, len(predicted) // 5)]
    top = best[uniform_pairs(len(best), tries // 2, rng)]
    others = diverse_pairs(images, max(1, n_pairs // 2), tries // 2, rng)
    return np.stack([top, others], axis=1).reshape(-1, 2)


def diverse_pairs(images, n_pairs, tries, rng):
    """(tries, 2): each of the n_pairs images that k_centers() finds, in turn, with any other image."""
    thumbs = images[:, ::4, ::4].reshape(len(images), -1).astype(np.float32)  # (N, pixels / 16 * 3)
    centers = k_centers(thumbs, min(n_pairs, len(images)), rng)
    pairs = uniform_pairs(len(images), tries, rng)  # (tries, 2)
    step = (pairs[:, 1] - pairs[:, 0]) % len(images)  # never 0
    pairs[:, 0] = np.resize(centers, tries)
    pairs[:, 1] = (pairs[:, 0] + step) % len(images)
    # trap: the rare image must not always be the first. Real VLMs lean to one side, and would then always favour it.
    flip = rng.random(tries) < 0.5
    return np.where(flip[:, None], pairs[:, ::-1], pairs)


def k_centers(points, k, rng):
    """Greedy k-center (Gonzalez 1985): each new center is the point farthest from all centers so far.

    points: (N, D) -> (k,) rows, the first at random.
    """
    centers = [int(rng.integers(len(points)))]
    distance = np.full(len(points), np.inf)  # (N,) squared, to the nearest center
    while len(centers) < k:
        distance = np.minimum(distance, ((points - points[centers[-1]]) ** 2).sum(1))
        centers.append(int(distance.argmax()))
    return np.array(centers)


# ---- STEP 4: fit the reward model to the answers ----
class PreferenceDataset:
    """D, a ring of answered pairs: first, second (N, H, W, 3) uint8; label (N,) from 0 to 1, the y of the paper.

    held_out (N,) bool: these answers are not fitted, they only measure.
    """

    ARRAYS = ("first", "second", "label", "held_out")

    def __init__(self, capacity, image_shape):
        self.capacity, self.added = int(capacity), 0
        self.first = np.zeros((self.capacity, *image_shape), np.uint8)
        self.second = np.zeros((self.capacity, *image_shape), np.uint8)
        self.label = np.zeros(self.capacity, np.float32)
        self.held_out = np.zeros(self.capacity, bool)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, first, second, label):
        """Store M answers: first, second (M, H, W, 3) uint8, label (M,) 0, 1, or between them. Raises ValueError."""
        label = np.asarray(label)
        check_images(self.first, first, label)
        check_images(self.second, second, label)
        if not ((label >= 0) & (label <= 1)).all():
            raise ValueError(f"labels must be 0 to 1, got {sorted(set(label.tolist()))}; leave out what is unsure")
        for one, two, answer in zip(first, second, label):
            row = self.added % self.capacity
            self.first[row], self.second[row], self.label[row] = one, two, answer
            self.held_out[row] = self.added % HOLD_OUT == HOLD_OUT - 1
            self.added += 1

    def rows(self, held_out=False):
        return np.flatnonzero(self.held_out[: len(self)] == held_out)

    def batches(self, size, rng, held_out=False):
        """All rows once, in random order: (first (B, H, W, 3), second, label (B,))."""
        rows = rng.permutation(self.rows(held_out))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield self.first[part], self.second[part], self.label[part]

    def state_dict(self):
        n = len(self)
        arrays = ((name, getattr(self, name)[:n]) for name in self.ARRAYS)
        return {"added": self.added, **{name: torch.from_numpy(array.copy()) for name, array in arrays}}

    def load_state_dict(self, state):
        self.added = state["added"]
        for name in self.ARRAYS:
            getattr(self, name)[: len(self)] = state[name].numpy()


def check_images(stored, images, answers):
    """ValueError unless images are uint8, of the size of the stored ones, and one for each answer."""
    shape, images = (len(answers), *stored.shape[1:]), np.asarray(images)
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(f"images must be {shape} uint8, not {images.shape} {images.dtype}")


def preference_loss(r0, r1, label, lean=0.0):
    """Bradley-Terry cross-entropy: how unlikely the reward model finds the VLM's answers.

        P = P[second is better] = exp(r1 + b) / (exp(r0) + exp(r1 + b)) = sigmoid(r1 - r0 + b)
        loss = mean of -(y log P + (1 - y) log(1 - P))

    r0, r1: (B,) rewards of the first and second image, already times beta.
    label: (B,) y: 0 = the first is better, 1 = the second is better; between them, how sure the VLM is of the second.
    lean: b, () or a number. It is the order effect of paired comparisons (Davidson and Beaver 1977): what speaks for
    the second image whatever the images are.
    Example: r0 == r1 and b = 0 -> log 2 = 0.693, whatever the labels.
    """
    assert r0.ndim == 1 and r0.shape == r1.shape == label.shape, (r0.shape, r1.shape, label.shape)
    return F.binary_cross_entropy_with_logits(r1 - r0 + lean, label.to(r0.dtype))


class RewardNet(nn.Module):
    """r(image): (B, 3, H, W) in [0, 1] -> (B,) in (-1, 1). Four convolutions, one linear layer, tanh."""

    def __init__(self, height, width, beta=BETA, normalise=True):
        super().__init__()
        parts, channels = [], 3
        self.beta = beta
        for out, kernel, stride in LAYERS:
            # One group: over all channels and pixels of one image. So its reward does not depend on its batch.
            norm = nn.GroupNorm(1, out) if normalise else nn.Identity()
            parts += [nn.Conv2d(channels, out, kernel, stride), norm, nn.ReLU(inplace=True)]
            height, width, channels = (height - kernel) // stride + 1, (width - kernel) // stride + 1, out
        if min(height, width) < 1:
            raise ValueError("the reward network needs images of at least 47 x 47 pixels")
        self.convolutions = nn.Sequential(*parts)
        self.head = nn.Linear(channels * height * width, 1)
        self.lean = nn.Parameter(torch.zeros(()))  # b of preference_loss(); forward() has no use for it

    def forward(self, x):
        features = self.convolutions(x).flatten(1)  # (B, channels * height * width)
        # r = tanh(z / beta), and the loss uses beta * r: almost z itself while |z| < 5, and never above 10. So tanh
        # hardly changes the gradients, and small differences near the goal survive.
        return torch.tanh(self.head(features) / self.beta).squeeze(-1)  # (B, 1) -> (B,)


class RewardModel:
    """r_psi, an ensemble of RewardNets: their mean is the reward, their spread says where it is not sure.

    fit(data, epochs) -> dict;  predict((N, H, W, 3) uint8) -> (N,) float32;  member_rewards(same) -> (members, N).
    The members disagree where the answers do not decide: they differ only in what is random, their first weights, the
    order in which they see the answers, and how images are augmented.
    batch: answers in one step of a fit.  patience: a fit ends when the loss on the held-out answers has not fallen for
    more epochs than that; 0: they do not stop it.
    random_shift: pixels by which a fit moves an image at most.  random_flip: a fit flips half of the images left to
    right. Use it only where the goal knows no left and right; an image is then worth what its mirror image is worth.
    intercept: whether b is fitted; without it, b is 0.
    """

    beta, normalise = BETA, True  # of its networks; a subclass may change them

    def __init__(self, image_shape, ensemble_size=3, lr=3e-4, device="cpu", seed=0, batch=16, patience=10,
                 random_shift=0, random_flip=False, intercept=True):
        self.image_shape, self.ensemble_size, self.batch, self.patience = image_shape, ensemble_size, batch, patience
        self.random_shift, self.random_flip, self.intercept = random_shift, random_flip, intercept
        self.device, self.rng = torch.device(device), np.random.default_rng(seed)
        self.mean, self.deviation = 0.0, 1.0  # of the ensemble's reward over all images in D
        self.pull = torch.zeros((), device=self.device)  # how strongly this fit holds b at 0
        self.nets = self._new_networks()
        self.optimizer = self._adam(lr)

    def _adam(self, lr):
        return torch.optim.Adam(self._parameter_groups(lr), fused=True)

    def _parameter_groups(self, lr):
        """All weights with the learning rate lr, and b with its own."""
        leans = [net.lean for net in self.nets]
        weights = [weight for net in self.nets for weight in net.parameters() if weight is not net.lean]
        return [{"params": weights, "lr": lr}, {"params": leans, "lr": LEAN_LR}]

    def _new_networks(self):
        """Networks whose first weights are drawn from the model's own generator."""
        height, width, _ = self.image_shape
        # Layers draw their first weights from torch's global generator; fork_rng leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.rng.integers(2**31)))
            nets = nn.ModuleList(RewardNet(height, width, self.beta, self.normalise) for _ in range(self.ensemble_size))
        return nets.to(self.device, memory_format=torch.channels_last)

    def fresh_networks(self):
        """New weights, and an optimiser that has seen nothing. Both are written over the old tensors, in place."""
        self.nets.load_state_dict(self._new_networks().state_dict())
        for moments in self.optimizer.state.values():
            for moment in moments.values():  # Adam starts with zeros, its count of steps too
                moment.zero_()

    def fit(self, data, epochs, stop_accuracy=0.97):
        """Go over all fitted answers up to `epochs` times.

        -> dict(loss, train_accuracy, heldout_accuracy, epochs, lean)
        Stops after an epoch in which the accuracy exceeded stop_accuracy, as in the official code: to go on would only
        push apart what is ordered already. Stops also by the held-out answers ("Differs" 1), if there are at least
        four of them.
        train_accuracy: of single members, while they learn, on augmented images; heldout_accuracy: of the fitted
        ensemble.  lean: mean b of the members; sigmoid(lean) is how often two equal images make the VLM say "second".
        Raises ValueError if there is nothing to fit.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if len(data.rows()) == 0:
            raise ValueError("no answers to fit: every pair was unsure, unreadable or unanswered")
        self.fresh_networks()
        self.pull.fill_(LEAN_PULL / len(data.rows()))
        least, best = np.inf, 0  # the least loss on the held-out answers, and its epoch
        judges = self.patience and len(data.rows(held_out=True)) >= 4
        for epoch in range(1, epochs + 1):
            loss, accuracy = self.one_epoch(data)
            if judges and (heldout := self.heldout_loss(data)) < least:
                least, best, kept = heldout, epoch, copy.deepcopy(self.nets.state_dict())
                of_best = loss, accuracy
            if accuracy > stop_accuracy or (judges and epoch - best > self.patience):
                break
        if judges:
            self.nets.load_state_dict(kept)
            loss, accuracy = of_best
        self.standardise(np.concatenate([data.first[: len(data)], data.second[: len(data)]]))
        return {"loss": loss, "train_accuracy": accuracy, "epochs": epoch,
                "heldout_accuracy": self.accuracy(data, held_out=True),
                "lean": float(np.mean([net.lean.item() for net in self.nets]))}

    def one_epoch(self, data):
        """Each member once over all fitted answers, in an order of its own -> mean loss, share of answers in order."""
        losses, right = [], []
        for batches in zip(*(data.batches(self.batch, self.rng) for _ in self.nets)):
            # Both images of a pair in one pass, not two: (2 B, H, W, 3) for each member.
            images = (torch.from_numpy(self.augment(np.concatenate([first, second]))) for first, second, _ in batches)
            loss, agrees = self.step(images, [torch.from_numpy(label) for *_, label in batches])
            losses.append(loss)
            right.append(agrees)
        # Read at the end of the epoch only: a GPU would have to be waited for each time.
        return float(torch.cat(losses).double().mean()), float(torch.cat(right).double().mean())

    def step(self, images, labels):
        """One gradient step of every member.

        images: for each member (2 B, H, W, 3) uint8, the first images before the second ones; labels: (B,) for each
        -> losses (members,); whether the rewards are in the order of the answer (members * B,).
        """
        losses, right = [], []
        self.optimizer.zero_grad(set_to_none=True)
        for net, both, label in zip(self.nets, images, labels):
            r0, r1 = self.rewards(net, both).chunk(2)  # (B,) each
            answer = label.to(self.device)  # (B,)
            # trap: tanh rewards differ by at most 2. Without beta, a perfect fit still costs log(1 + e^-2) = 0.127.
            lean = net.lean if self.intercept else 0.0
            loss = preference_loss(self.beta * r0, self.beta * r1, answer, lean)
            # pull: from few answers, b would take up by chance what the images are to explain.
            # Member by member, so that one member's activations at a time are in the cache.
            (loss + self.pull * net.lean**2 / 2).backward()
            losses.append(loss.detach())
            right.append((r1 > r0) == (answer > 0.5))
        self.optimizer.step()  # the members share no weights, so one optimiser serves all
        return torch.stack(losses), torch.cat(right)

    def rewards(self, net, images):
        """One network's rewards of images (N, H, W, 3) uint8 -> (N,)."""
        return net(as_input(images, self.device))

    def augment(self, images):
        """The images as a fit sees them: the same scenes, moved or flipped at random."""
        images = random_shift(images, self.random_shift, self.rng)
        return random_flip(images, self.rng) if self.random_flip else images

    def heldout_loss(self, data):
        """Mean loss of the members on the held-out answers, at the factor in SURENESS that suits their rewards best.

        trap: without a factor, a fit would end before it has begun. As a network learns, it grows sure of what it says,
        and the few answers that it has wrong soon cost more than all that it has gained. The order is what counts.
        """
        rows = data.rows(held_out=True)
        r0, r1 = (torch.from_numpy(self.beta * self.member_rewards(images[rows])).flatten()
                  for images in (data.first, data.second))  # (members * held out,) each
        label = torch.from_numpy(data.label[rows]).repeat(len(self.nets))
        lean = torch.stack([net.lean.detach().cpu() for net in self.nets]).repeat_interleave(len(rows))
        return min(float(preference_loss(factor * r0, factor * r1, label, lean)) for factor in SURENESS)

    def standardise(self, images):
        """From now on predict() has mean 0 and deviation 1 over these images.

        Preferences say nothing about the zero and the unit of a reward, and every fit begins with fresh networks. So
        without this, each fit would shift and stretch all rewards; Q-values, sums of some 1 / (1 - discount) rewards,
        would be off by a hundred times the shift, and the critics would first have to learn that.
        """
        rewards = self.member_rewards(images).mean(0)  # (N,)
        self.mean, self.deviation = float(rewards.mean()), max(float(rewards.std()), 1e-6)

    def accuracy(self, data, held_out):
        """Share of the answers on which the ensemble's order agrees; nan when there are none."""
        agree = [(self.predict(second) > self.predict(first)) == (label > 0.5)
                 for first, second, label in data.batches(256, np.random.default_rng(0), held_out)]
        return float(np.concatenate(agree).mean()) if agree else float("nan")

    @torch.no_grad()
    def member_rewards(self, images):
        """(N, H, W, 3) uint8 -> (members, N) float32, each network's own opinion."""
        parts = []
        # A GPU is idle with small batches, so give it 32 times as many images at once.
        at_once = PREDICT_BYTES * (1 if self.device.type == "cpu" else 32)
        chunk = max(1, at_once // (4 * int(np.prod(self.image_shape))))  # 4 bytes in a float32
        for start in range(0, len(images), chunk):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + chunk]))  # (chunk, H, W, 3)
            views = (part, part.flip(2)) if self.random_flip else (part,)
            rewards = torch.stack([sum(self.rewards(net, view) for view in views) for net in self.nets])
            parts.append((rewards / len(views)).cpu().numpy())
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(self.nets), 0), np.float32)

    def predict(self, images):
        """(N, H, W, 3) uint8 -> (N,) float32: the mean of the members, standardised."""
        return (self.member_rewards(images).mean(0) - self.mean) / self.deviation

    def state_dict(self):
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict(),
                "rng": self.rng.bit_generator.state, "mean": self.mean, "deviation": self.deviation}

    def load_state_dict(self, state):
        self.nets.load_state_dict(state["nets"])
        # trap: an optimiser takes over the step counter it is given: without the copy, two models would share it
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.rng.bit_generator.state = state["rng"]
        self.mean, self.deviation = state["mean"], state["deviation"]


def as_input(images, device):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1].

    The permuted view is "channels last" memory: it needs no copy, and convolutions on a CPU are fastest in it.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3, (images.dtype, images.shape)
    return images.to(device).permute(0, 3, 1, 2).float().div_(255)


def random_shift(images, most, rng):
    """Move each image by up to `most` pixels each way, repeating its edge: (N, H, W, 3) -> the same shape.

    An answer stays true wherever the camera points. From few answers a network does not learn that by itself
    (random shifts: arXiv 2004.13649).
    """
    if most == 0:
        return images
    count, height, width, _ = images.shape
    wide = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * most + 1, (count, 2))  # row and column where each image is cut out
    return np.stack([image[row : row + height, column : column + width]
                     for image, (row, column) in zip(wide, corners)])


def random_flip(images, rng):
    """(N, H, W, 3) -> the same images, each with left and right exchanged by the toss of a coin."""
    toss = rng.random((len(images), 1, 1, 1)) < 0.5
    return np.where(toss, images[:, :, ::-1], images)


# ---- demo: python reward_model.py ----
def demo_images(n, rng, size=64):
    """Images of a dark pole, its foot in the middle, within 45 degrees of upright -> (n, size, size, 3) uint8, angles
    (n,).
    """
    angle = rng.uniform(-45, 45, n)  # degrees
    y, x = np.mgrid[0:size, 0:size] / size - np.array([0.75, 0.5])[:, None, None]  # the foot is the origin
    radians = np.radians(angle)[:, None, None]
    along, across = (x * np.sin(radians) - y * np.cos(radians),
                     x * np.cos(radians) + y * np.sin(radians))  # (n, size, size) each
    pole = (along > 0) & (along < 0.5) & (np.abs(across) < 0.03)  # (n, size, size)
    grey = rng.integers(200, 256, (n, size, size))  # noise behind the pole, so that no single pixel tells the answer
    return np.where(pole, 60, grey)[..., None].repeat(3, -1).astype(np.uint8), angle


def demo():
    """Learn "the pole should stand upright" from 200 answers, then order unseen images -> share that is right."""
    rng = np.random.default_rng(0)
    images, angle = demo_images(400, rng)
    data = PreferenceDataset(200, images.shape[1:])
    pairs = sample_pairs(images, 200, rng)
    better = np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], better.astype(int))
    model = RewardModel(images.shape[1:])
    print({key: round(value, 3) for key, value in model.fit(data, epochs=50).items()})
    unseen, angle = demo_images(500, rng)
    pairs = sample_pairs(unseen, 2000, rng)
    reward = model.predict(unseen)
    right = (reward[pairs[:, 1]] > reward[pairs[:, 0]]) == (np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]]))
    print(f"unseen pairs ordered correctly: {right.mean():.1%} (expected: above 90%)")
    return float(right.mean())


if __name__ == "__main__":
    demo()
