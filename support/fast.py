"""Faster SAC and reward model, as subclasses: bfloat16 on a processor that has it, recorded CUDA graphs on a GPU.

What this is: `--fast 1`. The files that are read and copied, sac.py and reward_model.py, know nothing of it.
  bfloat16   half the bits in the layers that take the time. It pays only on a processor with AVX512-BF16 or AMX.
  Recorded   for networks this small, Python needs longer to launch the kernels of an update than a GPU to run them. A
             CUDA graph remembers the launches, with all addresses, and repeats them at once. The numbers are the same.
             On an H100, SAC then updates 13 times as often (results/bench_cuda.csv).
Which STEPs: 4 fit the reward model, 6 improve the policy.
Differs from the paper: it names no such thing.
Shapes: those of sac.py and reward_model.py.  Names: FastSAC, FastRewardModel, Recorded, has_bfloat16.

To use it elsewhere (beside sac.py and reward_model.py):
    from gymnasium.spaces import Box
    from support.fast import FastSAC, has_bfloat16
    agent = FastSAC(3, Box(-1, 1, (1,)), bfloat16=has_bfloat16())  # on a GPU: device="cuda", record=Recorded
"""
import torch

from reward_model import RewardModel, as_input
from sac import MLP, SAC


def has_bfloat16():
    """Does this processor multiply bfloat16 numbers? Elsewhere they are slower than float32. Linux says so; others:
    no.
    """
    try:
        with open("/proc/cpuinfo") as file:
            return any(flag in file.read() for flag in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


class Recorded:
    """function(*tensors) -> tensors, recorded as a CUDA graph at the fourth call and replayed from then on.

    The first three calls are made as usual: optimisers make their moments, libraries their plans.
    Tensors may come from anywhere; they are copied to where the recording reads them. What a call returns is
    overwritten by the next one.  generator: the random numbers that the function draws.
    trap: whatever *replaces* a tensor that the function uses, instead of writing to it (new weights, an optimiser that
    was loaded), is not seen by a replay: make a new Recorded then.
    trap: a replay repeats kernels, not Python: numbers (a learning rate), ifs, prints and what numpy draws stay as they
    were at the recording.
    """

    AS_USUAL = 3

    def __init__(self, function, device, generator=None):
        self.function, self.generator, self.calls = function, generator, 0
        self.device = torch.device(device)

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= self.AS_USUAL:
            # trap: not in the default stream, whose gradients a recording could not take over
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.function(*(tensor.to(self.device) for tensor in tensors))
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.calls == self.AS_USUAL + 1:
            self.inputs = [tensor.to(self.device, copy=True) for tensor in tensors]
            self.graph = torch.cuda.CUDAGraph()
            if self.generator is not None:  # trap: torch records no draws of a generator it was not told of
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):  # nothing is computed yet
                self.outputs = self.function(*self.inputs)
        for tensor, place in zip(tensors, self.inputs, strict=True):
            # trap: copy_ would stretch a batch of one over the whole, and convert other types
            assert (tensor.shape, tensor.dtype) == (place.shape, place.dtype), (tensor.shape, tensor.dtype)
            # pinned: otherwise the copy would wait until the GPU has done all it was given
            tensor = tensor if tensor.is_cuda else tensor.pin_memory()
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs


def adam(parameters, lr, device):
    """The optimiser of sac.py and reward_model.py; on a GPU one whose steps can be recorded."""
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=device.type == "cuda")


# ---- STEP 6, faster ----
class HalfMLP(MLP):
    """An MLP whose layers but the first and the last compute in bfloat16; the weights keep all their bits."""

    def forward(self, x):
        # trap: with eight significant bits, a pendulum 3 degrees from upright has the cosine of one that is upright,
        # and a value of 100 moves in steps of a half. So observations and values stay in float32.
        first, *hidden, last = self
        x = first(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            for layer in hidden:
                x = layer(x)
        return last(x.float())


class FastSAC(SAC):
    """SAC with its hidden layers in bfloat16, or with recorded updates.

    record: Recorded, on a GPU. Batches must then be of one size, and an update overwrites what the last one returned.
    """

    def __init__(self, *args, bfloat16=False, record=None, **settings):
        self.network = HalfMLP if bfloat16 else MLP
        self.record = record
        super().__init__(*args, **settings)

    def _adam(self, parameters):
        return adam(parameters, self.lr, self.device)

    def _record_anew(self):
        # trap: a replay works on the tensors it was recorded with. Whatever replaces one (critics, the mean and
        # deviation of observations, an optimiser that was loaded) must come through here.
        self._recorded = self.record and self.record(super()._step, self.device, self.rng)

    def _step(self, *tensors):
        return (self._recorded or super()._step)(*tensors)

    def reset_critic(self):
        super().reset_critic()
        self._record_anew()

    def normalise_observations(self, *args, **settings):
        super().normalise_observations(*args, **settings)
        self._record_anew()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._record_anew()


# ---- STEP 4, faster ----
class FastRewardModel(RewardModel):
    """RewardModel with its convolutions in bfloat16, or with recorded steps of a fit (record: Recorded, on a GPU)."""

    def __init__(self, *args, bfloat16=False, record=None, **settings):
        self.bfloat16, self.record, self._recorded = bfloat16, record, {}  # batch size -> a step of that size, recorded
        super().__init__(*args, **settings)

    def _adam(self, lr):
        return adam(self.nets.parameters(), lr, self.device)

    def rewards(self, net, images):
        if not self.bfloat16:
            return super().rewards(net, images)
        with torch.autocast(self.device.type, torch.bfloat16):
            features = net.convolutions(as_input(images, self.device).bfloat16()).flatten(1)
        # trap: with eight significant bits, a reward near 1 would move in steps of 0.004
        return torch.tanh(net.head(features.float()) / net.beta).squeeze(-1)

    def step(self, images, labels):
        if not self.record:
            return super().step(images, labels)
        batch = len(labels[0])  # the last batch of an epoch may be smaller: one recording for each size
        if batch not in self._recorded:
            plain, n = super().step, self.ensemble_size
            self._recorded[batch] = self.record(lambda *both: plain(both[:n], both[n:]), self.device)
        losses, right = self._recorded[batch](*images, *labels)
        return losses.clone(), right.clone()  # trap: a replay overwrites what the last one returned

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._recorded = {}  # trap: the optimiser now has other tensors than were recorded
