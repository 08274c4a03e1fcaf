"""A reward learned from preferences: which of two images is closer to the goal?

What this is: an ensemble of small CNNs r(image) -> (-1, 1), fitted to the answers "the first" (0)
or "the second" (1) with the Bradley-Terry model, and the choice of the pairs worth asking about.
Which STEPs: 2 pick pairs of images, 4 fit the reward model to the answers:
    P[second is better] = exp(k r1) / (exp(k r0) + exp(k r1)),  loss = mean of -log P[image picked]

Differs from the paper (RL-VLM-F, 2402.03681); RewardModel(paper=True) drops 3 to 5:
  1. One answer in eight is held out; a fit ends when these have not become less surprising for
     more than three epochs, and goes back to the best (paper=True: they are only reported).
  2. Networks see 64 to 100 px, the VLM 200 to 308. A fit takes 16 answers a step, officially 64.
  3. Rewards are sharpened in P, k = 10. With k = 1, P cannot leave [0.12, 0.88]: the loss falls
     only by pushing rewards to -1 and 1, and all pictures near the goal get the same.
  4. Normalisation after each convolution, and fresh networks at every fit (1910.08475).
  5. predict() is standardised over the fitted pictures (mean 0, deviation 1; 1706.03741).
  6. Fits may move (shift; 2004.13649) or mirror pictures at random; a reward is then the mean over
     the picture and its mirror image. One CNN for all tasks; pairs are drawn from all candidates.
Shapes: B batch, N images, M pairs, H and W pixels (at least 47). Images (N, H, W, 3) are uint8.
  preference_loss, sample_pairs, RewardNet, PreferenceDataset, RewardModel.  Only numpy and torch.

To use it elsewhere:
    import numpy as np, reward_model
    images = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    images[:, :32] //= 4  # a dark upper half; the goal here: brighter pictures
    pairs = reward_model.sample_pairs(images, 100, np.random.default_rng(1))  # (100, 2)
    first, second = images[pairs[:, 0]], images[pairs[:, 1]]
    data = reward_model.PreferenceDataset(100, (64, 64, 3))
    data.add(first, second, (second.mean((1, 2, 3)) > first.mean((1, 2, 3))).astype(int))
    model = reward_model.RewardModel((64, 64, 3))
    print(model.fit(data, epochs=3), model.predict(images).shape)
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HOLD_OUT = 8  # every eighth answer only measures, and says when to stop
SHARPNESS = 10.0  # P[second is better] reaches 0.9999 at a difference of one; see "Differs" 3
PRICED_AT_ONCE = 6 * 2**20  # bytes of pictures: among the fastest here, from 64 to 200 px
# channels, kernel, stride: the paper's CNN
LAYERS = ((16, 5, 3), (32, 3, 2), (64, 3, 2), (128, 3, 2))


# ---- STEP 2: pick pairs of images ----
def sample_pairs(images, n_pairs, rng, how="uniform", model=None):
    """Choose which pairs to ask about -> (M, 2) rows of `images`; no row is paired with itself.

    images: (N, H, W, 3) uint8.  rng: numpy Generator.  how:
      uniform       any two pictures that are not equal, all equally likely (the paper's).
      disagreement  of ten times as many pairs, those on which the members' P[second is better]
                    spreads most.
      entropy       of ten times as many pairs, those on which the ensemble's P[second is better]
                    is closest to 1/2.
      best          every other pair from the fifth of the pictures with the highest predicted
                    reward: what a policy does at the end depends on the order near the goal.
      diverse       one picture of each pair from a set that covers all there is to see (k-center),
                    the other any: rare pictures are asked about as often as frequent ones.
    model: RewardModel; best, disagreement and entropy need one; uniform stands in for them while
    there is none.
    """
    n = len(images)
    if n < 2:
        raise ValueError(f"a pair needs two images, and there {'is' if n == 1 else 'are'} {n}")
    if how not in SAMPLERS:
        raise ValueError(f"unknown sampler {how!r}; there are {', '.join(SAMPLERS)}")
    how = "uniform" if model is None and how != "diverse" else how
    tries = 10 * n_pairs
    pairs = (best_pairs(model.predict(images), tries, rng) if how == "best"
             else diverse_pairs(images, n_pairs, tries, rng) if how == "diverse"
             else uniform_pairs(n, tries, rng))
    worth = np.zeros(tries)
    if how in ("disagreement", "entropy"):
        rewards = model.member_rewards(images)  # (members, N)
        # P[second is better]: (members, tries)
        p_second = 1 / (1 + np.exp(
            model.sharpness * (rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]])))
        worth = p_second.std(0) if how == "disagreement" else -np.abs(p_second.mean(0) - 0.5)
    same = np.array([np.array_equal(images[a], images[b]) for a, b in pairs])
    worth[same] = -np.inf  # two equal pictures teach nothing: only when there is nothing else
    return pairs[np.argsort(-worth, kind="stable")[:n_pairs]]


SAMPLERS = ("uniform", "disagreement", "entropy", "best", "diverse")


def uniform_pairs(n, n_pairs, rng):
    """(M, 2) numbers below n, never two equal ones in a pair."""
    first = rng.integers(0, n, n_pairs)
    # trap: a step of 1 to n - 1 around the ring reaches every other image, the last one too, and
    # never itself
    second = (first + rng.integers(1, n, n_pairs)) % n
    return np.stack([first, second], axis=1)


def best_pairs(predicted, n_pairs, rng):
    """(M, 2): every other pair from the fifth with the highest predicted reward (N,)."""
    best = np.argsort(-predicted, kind="stable")[:max(2, len(predicted) // 5)]
    pairs = uniform_pairs(len(predicted), n_pairs, rng)
    pairs[::2] = best[uniform_pairs(len(best), n_pairs, rng)][::2]
    return pairs


def diverse_pairs(images, n_pairs, tries, rng):
    """(tries, 2): each of the n_pairs pictures that k_centers() finds, in turn, with any other."""
    thumbs = images[:, ::4, ::4].reshape(len(images), -1).astype(np.float32)  # (N, pixels / 16 * 3)
    centers = k_centers(thumbs, min(n_pairs, len(images)), rng)
    pairs = uniform_pairs(len(images), tries, rng)  # (tries, 2)
    shift = (pairs[:, 1] - pairs[:, 0]) % len(images)  # never 0
    pairs[:, 0] = np.resize(centers, tries)
    pairs[:, 1] = (pairs[:, 0] + shift) % len(images)
    flip = rng.random(tries) < 0.5  # the rare picture should not always be the first
    return np.where(flip[:, None], pairs[:, ::-1], pairs)


def k_centers(points, k, rng):
    """Greedy k-center (Gonzalez 1985): each new center is the point farthest from all so far.

    points: (N, D) -> (k,) rows, the first at random.
    """
    centers = [int(rng.integers(len(points)))]
    distance = np.full(len(points), np.inf)  # (N,) squared, to the nearest center
    while len(centers) < k:
        distance = np.minimum(distance, ((points - points[centers[-1]]) ** 2).sum(1))
        centers.append(int(distance.argmax()))
    return np.array(centers)


def check_pictures(stored, images, answers):
    """ValueError unless images are uint8, of the stored ones' size, one for each answer."""
    shape, images = (len(answers), *stored.shape[1:]), np.asarray(images)
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(f"pictures must be {shape} uint8, not {images.shape} {images.dtype}")


class PreferenceDataset:
    """A ring of answered pairs: first, second (N, H, W, 3) uint8; label (N,) 0 or 1.

    held_out (N,) bool: these only measure.
    """

    ARRAYS = ("first", "second", "label", "held_out")

    def __init__(self, capacity, image_shape):
        self.capacity, self.added = int(capacity), 0
        self.first = np.zeros((self.capacity, *image_shape), np.uint8)
        self.second = np.zeros((self.capacity, *image_shape), np.uint8)
        self.label = np.zeros(self.capacity, np.int64)
        self.held_out = np.zeros(self.capacity, bool)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, first, second, label):
        """Store M sure answers: first, second (M, H, W, 3) uint8, label (M,) in {0, 1}."""
        label = np.asarray(label)
        check_pictures(self.first, first, label)
        check_pictures(self.second, second, label)
        if not np.isin(label, (0, 1)).all():
            raise ValueError(f"labels must be 0 or 1, got {sorted(set(label.tolist()))}; "
                             "leave out what is unsure")
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
        return {"added": self.added,
                **{name: torch.from_numpy(array.copy()) for name, array in arrays}}

    def load_state_dict(self, state):
        self.added = state["added"]
        for name in self.ARRAYS:
            getattr(self, name)[: len(self)] = state[name].numpy()


# ---- STEP 4: fit the reward model to the answers ----
def preference_loss(r0, r1, label):
    """Bradley-Terry cross-entropy: how surprised the reward model is by the VLM's answers.

        P[second is better] = exp(r1) / (exp(r0) + exp(r1)),   loss = mean of -log P[image picked]

    r0, r1: (B,) rewards of the first and second image, already times the sharpness k.
    label: (B,) int64, 0 = first better, 1 = second better.
    Example: r0 == r1 -> log 2 = 0.693, whatever the labels.
    """
    assert r0.ndim == 1 and r0.shape == r1.shape == label.shape, (r0.shape, r1.shape, label.shape)
    logits = torch.stack([r0, r1], dim=-1)  # (B, 2); the column is the label: no sign to get wrong
    # trap: tanh rewards differ by at most 2: unsharpened, a perfect fit costs log(1 + e^-2) = 0.127
    return F.cross_entropy(logits, label)


def as_input(images, device, dtype=torch.float32):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) of dtype in [0, 1], still laid out pixel by pixel.

    The permuted view *is* "channels last" memory: no copy, and the layout in which convolutions on
    a CPU are fastest.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3, (
        images.dtype, images.shape)
    return images.to(device).permute(0, 3, 1, 2).to(dtype).div_(255)


def shifted(images, most, rng):
    """Move each picture by up to `most` pixels each way, repeating its edge: (N, H, W, 3) -> same.

    An answer stays true wherever the camera points; from few answers a network does not learn that
    by itself (random shifts: 2004.13649).
    """
    if most == 0:
        return images
    count, height, width, _ = images.shape
    wide = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * most + 1, (count, 2))  # row and column where each is cut out
    return np.stack([image[row : row + height, column : column + width]
                     for image, (row, column) in zip(wide, corners)])


def mirrored(images, rng):
    """(N, H, W, 3) -> the same, each with left and right exchanged by the toss of a coin."""
    toss = rng.random((len(images), 1, 1, 1)) < 0.5
    return np.where(toss, images[:, :, ::-1], images)


class RewardNet(nn.Module):
    """r(image): (B, 3, H, W) in [0, 1] -> (B,) in (-1, 1). Four convolutions, one linear, tanh."""

    def __init__(self, height, width, paper=False):
        super().__init__()
        parts, channels = [], 3
        self.softness = 1.0 if paper else SHARPNESS  # so that SHARPNESS * r is nearly linear
        for out, kernel, stride in LAYERS:
            # one group: over all channels and pixels of a picture, so no picture sees its batch
            norm = nn.Identity() if paper else nn.GroupNorm(1, out)
            parts += [nn.Conv2d(channels, out, kernel, stride), norm, nn.ReLU(inplace=True)]
            height, width, channels = (
                (height - kernel) // stride + 1, (width - kernel) // stride + 1, out)
        if min(height, width) < 1:
            raise ValueError("the reward network needs images of at least 47 x 47 pixels")
        self.convolutions = nn.Sequential(*parts)
        self.head = nn.Linear(channels * height * width, 1)

    def forward(self, x):
        features = self.convolutions(x).flatten(1)
        # trap: with eight significant bits, a reward near 1 would move in steps of 0.004
        with torch.autocast(x.device.type, enabled=False):
            logit = self.head(features.float())  # (B, 1)
        return torch.tanh(logit / self.softness).squeeze(-1)


class RewardModel:
    """An ensemble of RewardNets: their mean is the reward, their spread says where it is not sure.

    fit(data, epochs) -> dict;  predict((N, H, W, 3) uint8) -> (N,) float32;
    member_rewards(same) -> (members, N) in (-1, 1).
    batch: answers in one step of a fit; 64 in the official code.
    patience: a fit ends when the held-out answers have not become less surprising for more epochs
    than that; 0: they have no say.  shift, mirror: see shifted() and mirrored(); mirror only where
    the goal has no left and right: a picture is then worth what its mirror image is.
    paper: fit as the paper does (see the header).
    bfloat16: convolutions in half the bits: faster on a processor with AVX512-BF16 or AMX, above
    all with large pictures (bench.py measures it); slower on one without.
    record: cuda_graph.Recorded, for a GPU: one launch for a step of fit().
    """

    def __init__(self, image_shape, members=3, lr=3e-4, device="cpu", seed=0, batch=16,
                 patience=3, shift=0, mirror=False, paper=False, bfloat16=False, record=None):
        self.image_shape, self.members = image_shape, members
        self.patience, self.shift, self.mirror, self.paper = patience, shift, mirror, paper
        self.device, self.batch, self.record = torch.device(device), batch, record
        # of pictures and convolutions.  trap: pictures handed over in float32 would be converted
        # again by each member's first convolution
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.sharpness = 1.0 if paper else SHARPNESS  # of the rewards in P
        self.rng = np.random.default_rng(seed)
        self.mean, self.deviation = 0.0, 1.0  # of the ensemble's reward over the fitted pictures
        self.nets = self._new_networks()
        self.optimizer = torch.optim.Adam(self.nets.parameters(), lr=lr, fused=True,
                                          capturable=self.device.type == "cuda")
        self._recorded = {}  # batch size -> a step of that size, recorded

    def _new_networks(self):
        """Drawn from the model's own generator."""
        height, width, _ = self.image_shape
        # layers draw their first weights from torch's global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.rng.integers(2**31)))
            nets = nn.ModuleList(RewardNet(height, width, self.paper) for _ in range(self.members))
        return nets.to(self.device, memory_format=torch.channels_last)

    def fresh_networks(self):
        """New weights, and an optimiser that has seen nothing."""
        # trap: written over the old ones, for a replay works on the tensors it was recorded with
        self.nets.load_state_dict(self._new_networks().state_dict())
        for moments in self.optimizer.state.values():
            for moment in moments.values():  # Adam starts with zeros, its count of steps too
                moment.zero_()

    def fit(self, data, epochs, stop_accuracy=0.97):
        """Go over all training answers up to `epochs` times -> dict(loss, train_accuracy,
        heldout_accuracy, epochs).

        Members differ only in what is random: their first weights, the order in which they see the
        answers, and how pictures are moved and mirrored.  train_accuracy: of single members, while
        they learn, on pictures as a fit sees them; heldout_accuracy: of the fitted ensemble.
        Stops after an epoch in which their mean accuracy exceeded stop_accuracy (more would only
        sharpen what is ordered already), or when more than `patience` epochs have not made the
        held-out answers less surprising; goes back to the epoch when they surprised it least.
        Fewer than four held-out answers have no say.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if len(data.rows()) == 0:
            raise ValueError("no answers to fit: every pair was unsure, unreadable or unanswered")
        if not self.paper:
            self.fresh_networks()
        least, best = np.inf, 0  # best: the epoch in which the held-out answers surprised least
        judges = self.patience and not self.paper and len(data.rows(held_out=True)) >= 4
        for epoch in range(1, epochs + 1):
            loss, accuracy = self.one_epoch(data)
            if judges and (surprise := self.surprise(data)) < least:
                least, best, kept = surprise, epoch, copy.deepcopy(self.nets.state_dict())
                of_best = loss, accuracy
            if accuracy > stop_accuracy or (judges and epoch - best > self.patience):
                break
        if judges:
            self.nets.load_state_dict(kept)
            loss, accuracy = of_best
        if not self.paper:
            self.standardise(np.concatenate([data.first[: len(data)], data.second[: len(data)]]))
        return {"loss": loss, "train_accuracy": accuracy, "epochs": epoch,
                "heldout_accuracy": self.accuracy(data, held_out=True)}

    def one_epoch(self, data):
        """Each member once over all training answers -> mean loss, share it had in order."""
        losses, right = [], []
        for batches in zip(*(data.batches(self.batch, self.rng) for _ in self.nets)):
            # one pass for both, not two: (2 B, H, W, 3); a generator: one member's pictures at a
            # time stay in the cache.  trap: not in _step: a recording would freeze numpy's draws
            images = (torch.from_numpy(self.views(np.concatenate([first, second])))
                      for first, second, _ in batches)
            labels = [torch.from_numpy(label) for *_, label in batches]  # (B,) each
            if self.record:
                loss, agrees = self._recorded_step(len(labels[0]))(*images, *labels)
            else:
                loss, agrees = self._step(images, labels)
            losses.append(loss.clone())  # trap: a replay overwrites what the last one returned
            right.append(agrees.clone())
        # read at the end of the epoch: a GPU would have to be waited for each time
        return float(torch.cat(losses).double().mean()), float(torch.cat(right).double().mean())

    def _recorded_step(self, batch):
        """_step for this batch size, one recording for each: the last batch may be smaller."""
        if batch not in self._recorded:
            self._recorded[batch] = self.record(
                lambda *both: self._step(both[: self.members], both[self.members :]), self.device)
        return self._recorded[batch]

    def _step(self, images, labels):
        """One gradient step of every member.

        images: (2 B, H, W, 3) uint8 for each, the first ones before the second; labels: (B,) each
        -> losses (members,); whether the rewards are in the order of the answer (members * B,).
        """
        losses, right = [], []
        self.optimizer.zero_grad(set_to_none=True)
        for net, both, label in zip(self.nets, images, labels):
            with self.precision():
                r0, r1 = net(as_input(both, self.device, self.dtype)).chunk(2)
            answer = label.to(self.device)  # (B,)
            loss = preference_loss(self.sharpness * r0, self.sharpness * r1, answer)
            loss.backward()  # at once: one member's activations at a time stay in the cache
            losses.append(loss.detach())
            right.append((r1 > r0) == answer.bool())
        self.optimizer.step()  # the members share nothing, so one optimiser serves all
        return torch.stack(losses), torch.cat(right)

    def precision(self):
        """The context in which networks are called."""
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def views(self, images):
        """The pictures as a fit sees them: the same scenes, moved or mirrored at random."""
        images = shifted(images, self.shift, self.rng)
        return mirrored(images, self.rng) if self.mirror else images

    def surprise(self, data):
        """Mean loss of the members on the held-out answers."""
        rows = data.rows(held_out=True)
        r0, r1 = (torch.from_numpy(self.sharpness * self.member_rewards(images[rows]))
                  for images in (data.first, data.second))  # (members, H)
        label = torch.from_numpy(data.label[rows])
        return float(np.mean([preference_loss(one, two, label) for one, two in zip(r0, r1)]))

    def standardise(self, images):
        """From now on predict() has mean 0 and deviation 1 over these pictures."""
        rewards = self.member_rewards(images).mean(0)  # (N,)
        self.mean, self.deviation = float(rewards.mean()), max(float(rewards.std()), 1e-6)

    def accuracy(self, data, held_out):
        """Share of the answers on which the ensemble's order agrees; nan when there are none."""
        agree = [(self.predict(second) > self.predict(first)) == (label == 1)
                 for first, second, label in data.batches(256, np.random.default_rng(0), held_out)]
        return float(np.concatenate(agree).mean()) if agree else float("nan")

    @torch.no_grad()
    def member_rewards(self, images):
        """(N, H, W, 3) uint8 -> (members, N) float32, each network's own opinion."""
        parts = []
        at_once = PRICED_AT_ONCE * (1 if self.device.type == "cpu" else 32)  # few slow a GPU down
        chunk = max(1, at_once // (int(np.prod(self.image_shape)) * self.dtype.itemsize))
        for start in range(0, len(images), chunk):
            x = as_input(images[start : start + chunk], self.device, self.dtype)
            views = (x, x.flip(-1)) if self.mirror else (x,)
            with self.precision():
                rewards = torch.stack([sum(net(view) for view in views) for net in self.nets])
            parts.append((rewards / len(views)).cpu().numpy())
        return (np.concatenate(parts, axis=1) if parts
                else np.zeros((len(self.nets), 0), np.float32))

    def predict(self, images):
        """(N, H, W, 3) uint8 -> (N,) float32: the mean of the members, standardised."""
        return (self.member_rewards(images).mean(0) - self.mean) / self.deviation

    def state_dict(self):
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict(),
                "rng": self.rng.bit_generator.state,
                "mean": self.mean, "deviation": self.deviation}

    def load_state_dict(self, state):
        self.nets.load_state_dict(state["nets"])
        # trap: an optimiser takes over the step counter it is given: without the copy, two models
        # would share it
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.rng.bit_generator.state, self.mean, self.deviation = (
            state["rng"], state["mean"], state["deviation"])
        self._recorded = {}  # trap: the optimiser now has other tensors than were recorded


def demo_pictures(n, rng, size=64):
    """Pictures of a dark pole, its foot in the middle, within 45 degrees of upright.

    -> (n, size, size, 3) uint8, angles (n,).
    """
    angle = rng.uniform(-45, 45, n)  # degrees
    # the foot is the origin
    y, x = np.mgrid[0:size, 0:size] / size - np.array([0.75, 0.5])[:, None, None]
    radians = np.radians(angle)[:, None, None]
    along, across = (x * np.sin(radians) - y * np.cos(radians),
                     x * np.cos(radians) + y * np.sin(radians))  # (n, size, size) each
    pole = (along > 0) & (along < 0.5) & (np.abs(across) < 0.03)  # (n, size, size)
    grey = rng.integers(200, 256, (n, size, size))  # noise behind, so that no pixel is memorised
    return np.where(pole, 60, grey)[..., None].repeat(3, -1).astype(np.uint8), angle


def demo():
    """Learn "the pole should stand upright" from 200 answers; then order unseen pictures."""
    rng = np.random.default_rng(0)
    images, angle = demo_pictures(400, rng)
    data = PreferenceDataset(200, images.shape[1:])
    pairs = sample_pairs(images, 200, rng)
    better = np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], better.astype(int))
    model = RewardModel(images.shape[1:])
    print({key: round(value, 3) for key, value in model.fit(data, epochs=50).items()})
    unseen, angle = demo_pictures(500, rng)
    pairs = sample_pairs(unseen, 2000, rng)
    reward = model.predict(unseen)
    right = (reward[pairs[:, 1]] > reward[pairs[:, 0]]) == (
        np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]]))
    print(f"unseen pairs ordered correctly: {right.mean():.1%} (expected: above 90%)")
    return float(right.mean())


if __name__ == "__main__":
    demo()
