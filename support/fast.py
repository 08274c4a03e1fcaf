"""Faster SAC and reward model, as subclasses: gradients by hand, bfloat16, recorded CUDA graphs.

What this is: `--fast 1`, the default, takes ByHand; `--fast 2` takes all of it. The files that are read and copied,
sac.py and reward_model.py, know nothing of it. Whoever changes sac.py gets what it says: follows_sac().
  ByHand     SAC without autograd, on a CPU. For networks this small, much of an update is not arithmetic: autograd
             records every operation in order to go back through them, each layer is a call of its own, and the
             optimiser handles a tensor for each. Here every derivative is written out, both critics are one batched
             product, all weights of an optimiser are one vector, and every tensor of a layer's size is made once. Large
             products go to the faster of torch's two libraries, and acting is a handful of operations. The weights are
             those that sac.SAC would have, but for rounding. About twice as many training steps (results/bench.csv).
  bfloat16   half the bits in the layers that take the time. It pays only on a processor with AVX512-BF16 or AMX, and
             only in layers of 128 or more: at 2 x 64 the conversions cost more than the products gain.
  Recorded   for networks this small, Python needs longer to launch the kernels of an update than a GPU to run them. A
             CUDA graph remembers the launches, with all addresses, and repeats them at once. The numbers are the same.
             On an H100, SAC then updates 13 times as often (results/bench_cuda.csv).
Which STEPs: 4 fit the reward model, 6 improve the policy.
Differs from the paper: it names no such thing.
Shapes: those of sac.py and reward_model.py; P the weights of one network, or of all that an optimiser has. L is the
loss that is minimised, and d_x is short for dL/dx, which has the shape of x.
Names: FastSAC, FastRewardModel, has_bfloat16, Recorded; ByHand, Networks (forward, backward), Layer, Product, FlatAdam,
*_gradient.

To use it elsewhere (beside sac.py and reward_model.py):
    from gymnasium.spaces import Box
    from support.fast import FastSAC, has_bfloat16
    agent = FastSAC(3, Box(-1, 1, (1,)), bfloat16=has_bfloat16())  # on a GPU: device="cuda", record=Recorded
"""
import functools
import inspect
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from reward_model import RewardModel, as_input
from sac import LOG_STD_MAX, LOG_STD_MIN, MLP, SAC, TwinCritic, tanh_gaussian


def has_bfloat16():
    """Does this processor multiply bfloat16 numbers? Elsewhere they are slower than float32. Only Linux tells."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    except OSError:
        return False


LAYER_NORM_EPS = 1e-5  # torch.nn.LayerNorm's own: added to the variance, so that it is never 0
# The checksum of the parts of sac.py whose derivatives are written out here: follows_sac().
WRITTEN_FOR = 4172881335


def follows_sac():
    """Are the gradients by hand still those of sac.py? Whoever has changed a loss there wants to see what it does.

    Without this, a change in sac.py would change nothing in a run. Call it before a run uses FastSAC on a CPU.
    """
    try:
        text = "".join(inspect.getsource(part) for part in (MLP, TwinCritic, tanh_gaussian, SAC))
    except OSError:  # the text is not there, as in a packed program: then nobody has changed it
        return True
    return zlib.crc32(text.encode()) == WRITTEN_FOR


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


# ---- STEP 6, with gradients by hand ----
def views(vector, tensors):
    """A vector (P,) as parts with the shapes of the tensors, one after the other, in the memory of the vector."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def flatten(parameters):
    """Move the numbers of all parameters to one vector (P,). Each parameter is then a view of its part of it.

    So whoever writes to the vector changes the networks, and the other way round.
    """
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, views(vector, parameters), strict=True):
        parameter.data = part
    return vector


@functools.cache
def onednn_is_exact():
    """May oneDNN have the large products of float32 numbers? Asked once, by a product whose error tells.

    torch calls MKL for them. On an AMD processor with AVX512, MKL reaches about half of the speed of oneDNN, torch's
    other library. torch gives float32 to oneDNN only where it is told that bfloat16 is precise enough.
    trap: processors with AMX then do round, as they were told they may. Others gain nothing by rounding, and compute
    with all bits. Only these may be told so; on the others MKL is fast.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):  # an older torch
        return False
    x = torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    by_onednn(lambda: torch.bmm(x, x, out=out))
    return bool((out - x.double() @ x.double()).abs().max() < 1e-3)  # rounded to bfloat16: about 0.1


def by_onednn(product):
    """Call product(), a call of torch.bmm or torch.baddbmm, with float32 given to oneDNN."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        product()
    finally:  # trap: the setting is one of the whole process, so nothing else may find it changed
        setting.fp32_precision = before


class Product:
    """out <- a b, or bias + a b, for all networks at once.

    a (networks, m, k), b (networks, k, n), bias (networks, 1, n) -> out (networks, m, n).
    Made once for tensors that stay where they are, and called whenever their numbers have changed: so whatever must be
    decided, and every view, costs nothing in the call.
    """

    # Multiplications. A call of oneDNN costs about 10 microseconds besides the product; from here on it gains more.
    ONEDNN_FROM = 1_000_000

    def __init__(self, out, a, b, bias=None):
        (_, m, n), single = out.shape, out.dtype == torch.float32
        self.place = None
        if single and n <= 32 < m and (n > 1 or not b.is_contiguous()):
            # trap: MKL needs up to four times as long for a result of few columns as for one of few rows. So the
            # transpose is computed, (a b)^T = b^T a^T, and copied.
            self.place, a, b, bias = out, b.mT, a.mT, None if bias is None else bias.mT
            out = torch.empty(len(out), n, m)
            self.transposed = out.mT
        if a.shape[2] == 1 and bias is None:  # each number of a column times each of a row
            self.product = functools.partial(torch.mul, a, b, out=out)
        elif bias is None:
            self.product = functools.partial(torch.bmm, a, b, out=out)
        else:
            self.product = functools.partial(torch.baddbmm, bias, a, b, out=out)
        if single and out.numel() * a.shape[2] >= self.ONEDNN_FROM and onednn_is_exact():
            self.product = functools.partial(by_onednn, self.product)

    def __call__(self):
        self.product()
        if self.place is not None:
            self.place.copy_(self.transposed)


class Layer:
    """A layer of all networks with its tensors, for batches of one size: y = x W^T + b.

    before: the tensor that the layer before writes to, (networks, B, in).
    weight (networks, out, in), bias (networks, 1, out); d_weight and d_bias of the same shapes: where the derivatives
    by them are to be written; or None.
    dtype: of the arithmetic. What is of another type has a copy here, which is converted anew at each call.
    """

    def __init__(self, before, weight, bias, dtype, d_weight=None, d_bias=None):
        self.converted = []  # pairs: a copy, and the tensor it is a copy of
        self.before, self.d_weight, self.d_bias = before, d_weight, d_bias
        self.x, self.weight, self.bias = (self._as(dtype, tensor) for tensor in (before, weight, bias))
        self.y = torch.empty(*before.shape[:2], weight.shape[1], dtype=dtype)
        self.forward = Product(self.y, self.x, self.weight.mT, self.bias)

    def _as(self, dtype, tensor):
        """The tensor, or a place for its copy in another type."""
        if tensor.dtype == dtype:
            return tensor
        self.converted.append((torch.empty(tensor.shape, dtype=dtype), tensor))
        return self.converted[-1][0]

    def prepare_backward(self, rows, to_input, after=None):
        """Make the tensors of the way back, for the last so many rows of the batch; after: the layer after this one."""
        self.h = self.x[:, -rows:]
        # d of this layer is d_h of the one after it, unless that one computes with another number of bits
        same = after is not None and after.d_x.dtype == self.y.dtype
        self.d = after.d_x if same else torch.empty_like(self.y[:, -rows:])
        weight = self.weight[..., to_input:]
        self.d_x = torch.empty(*self.h.shape[:2], weight.shape[2], dtype=self.y.dtype)
        self.through = Product(self.d_x, self.d, weight)
        if self.d_weight is not None:
            # `out` of a product does not convert bfloat16, so that is written to a place of its own first
            self.own_d_weight = self.d_weight if self.d.dtype == self.d_weight.dtype else torch.empty_like(self.weight)
            self.to_weight = Product(self.own_d_weight, self.d.mT, self.h)

    def to_weights(self):
        """From d, by what the layer gave, to the derivatives by its weight and its bias."""
        self.to_weight()
        if self.own_d_weight is not self.d_weight:
            self.d_weight.copy_(self.own_d_weight)
        torch.sum(self.d, 1, keepdim=True, dtype=self.d_bias.dtype, out=self.d_bias)


# (d, h, 0, grad_input=d): d where h > 0, else 0. What autograd calls for a ReLU: one pass, where d * (h > 0) takes two.
relu_backward = torch.ops.aten.threshold_backward.grad_input


def interleaved(networks):
    """The parameters of equal networks: the first weight of each, the first bias of each, the second weight of each...

    So the weights of a layer lie side by side, as one tensor (networks, out, in). With gaps between them, oneDNN would
    copy them first, for a third of the time that the product takes.
    """
    return [each for same in zip(*(network.parameters() for network in networks)) for each in same]


class Networks:
    """Equal MLPs whose weights lie in one vector, as interleaved() puts them: forward and backward of all at once.

    weights (networks * P,), sizes (in, hidden..., out). gradient (networks * P,): where backward() writes; or None.
    bfloat16: as HalfMLP does it, in all layers but the first and the last.
    layer_norm: as in MLP, between a layer and its max.
    to_input: backward() is asked for the derivative by the input, of its numbers from this one on.

    All tensors are made once for each size of a batch: new memory of this size costs as much as a layer, because the
    system clears each of its pages first.
    """

    def __init__(self, weights, networks, sizes, gradient=None, bfloat16=False, to_input=0, layer_norm=False):
        self.layer_norm = layer_norm
        self.parameters = self._views(weights, networks, sizes)
        nothing = [(None, None)] * len(self.parameters)
        self.gradients = nothing if gradient is None else self._views(gradient, networks, sizes)
        self.bfloat16, self.to_input, self.x = bfloat16, to_input, torch.empty(0)

    @staticmethod
    def _views(vector, networks, sizes):
        """vector (networks * P,) -> of each layer its weight (networks, out, in) and its bias (networks, 1, out)."""
        shapes = [shape for n_in, n_out in zip(sizes[:-1], sizes[1:]) for shape in ((n_out, n_in), (1, n_out))]
        parts = iter(views(vector, [torch.empty(networks, *shape, device="meta") for shape in shapes]))
        return list(zip(parts, parts))

    def _prepare(self, shape):
        """Make the layers for batches x of this shape; those for another size are dropped."""
        weight, _ = self.parameters[0]
        before = self.x = torch.empty(shape, dtype=weight.dtype)
        self.layers, self.rows, last = [], None, len(self.parameters) - 1
        for number, (pair, gradients) in enumerate(zip(self.parameters, self.gradients)):
            dtype = torch.bfloat16 if self.bfloat16 and 0 < number < last else weight.dtype
            self.layers.append(Layer(before, *pair, dtype, *gradients))
            before = torch.empty_like(self.layers[-1].y) if self.layer_norm else self.layers[-1].y

    def forward(self, x):
        """x (networks, B, in) -> output (networks, B, out):

            h_0 = x,   h_(l+1) = max(0, h_l W_l^T + b_l),   without the max after the last layer
        With layer_norm, each of the B rows z of h_l W_l^T + b_l becomes (z - mean) / deviation before the max.
        trap: the next forward() overwrites what is returned.
        """
        if x.shape != self.x.shape:
            self._prepare(x.shape)
        self.x.copy_(x)
        for layer, previous in zip(self.layers, [None, *self.layers]):
            if previous is not None:
                if self.layer_norm:
                    z = previous.y  # (networks, B, out)
                    normalised, *layer.moments = torch.native_layer_norm(z, z.shape[2:], None, None, LAYER_NORM_EPS)
                    layer.before.copy_(normalised)
                layer.before.relu_()  # in place: nobody needs what was there before the max
            for own, tensor in layer.converted:
                own.copy_(tensor)
            layer.forward()
        return layer.y

    def backward(self, d_output, to_weights=True):
        """The chain rule through the last forward(), from the last layer to the first: derivatives of the loss L.

        Let d_l be the derivative by what layer l gives before its max, (networks, B, out). Then
            d_W_l   = d_l^T h_l              (networks, out, in)
            d_b_l   = sum of d_l over B      (networks, 1, out)
            d_h_l   = d_l W_l                (networks, B, in)
            d_(l-1) = d_h_l where h_l > 0, else 0:   max(0, .) is flat below 0, and has slope 1 above
        With layer_norm, d_(l-1) is then the derivative d by n = (z - mean) / deviation. Both depend on each z of a row:
            d_z     = (d - mean of d - n * mean of d n) / deviation      means over the numbers of a row
        d_output (networks, B, out): of the last B rows of the batch, which may have had others before them.
        to_weights: d_W and d_b are written to the vector `gradient`. Otherwise they are left out, and d_x is returned,
        (networks, B, in - to_input). Nobody needs both.
        """
        first = self.layers[0]
        if self.rows != d_output.shape[1]:
            self.rows = d_output.shape[1]
            for layer, after in zip(self.layers[::-1], [None, *self.layers[::-1]]):
                layer.prepare_backward(self.rows, self.to_input if layer is first else 0, after)
        d = d_output
        for layer, previous in zip(self.layers[::-1], [*self.layers[-2::-1], None]):
            if layer.d is not d:
                layer.d.copy_(d)
            if to_weights:
                layer.to_weights()
                if layer is first:
                    return None
            layer.through()
            d = layer.d_x
            if layer is not first:
                relu_backward(d, layer.h, 0, grad_input=d)
                if self.layer_norm:
                    z, moments = previous.y[:, -self.rows:], [each[:, -self.rows:] for each in layer.moments]
                    d, _, _ = torch.ops.aten.native_layer_norm_backward(d.to(z.dtype), z, z.shape[2:], *moments, None,
                                                                        None, [True, False, False])
        return d


def gaussian_gradient(d_action, action, log_std, tanh_raw, noise, alpha):
    """The derivative of the actor's loss by its output, back through tanh_gaussian(): (B, 2A), for L = mean over B of

        l = alpha * log pi(a|s) - Q(s, a),   a = tanh(u),   u = mean + std * noise,   std = e^log_std

    First by u. da/du = 1 - a^2. In log pi = log N - log(1 - a^2), log N = -noise^2 / 2 - log_std + constant does not
    depend on u, because the noise is given; and d log(1 - a^2) / du = -2a (1 - a^2) / (1 - a^2) = -2a. So
        d log pi / du      = 2a,                       d_u       = d_action (1 - a^2) + alpha / B * 2a
    Then by the two numbers that u is made of: du/dmean = 1, du/dlog_std = std * noise, and log N has its -log_std:
        d log pi / dmean    = 2a,                      d_mean    = d_u
        d log pi / dlog_std = 2a * std * noise - 1,    d_log_std = d_u * std * noise - alpha / B
    Last, the actor gives raw, with log_std = MIN + (MAX - MIN) / 2 * (tanh(raw) + 1):
        d_raw = d_log_std * (MAX - MIN) / 2 * (1 - tanh(raw)^2)
    d_action: the part of L that is -Q / B, by the action; that and the rest (B, A), but alpha, a number.
    Example: B = A = 1, d_action 1, a 0, log_std 0, tanh_raw 0, noise 2, alpha 0.1 -> d_mean 1, d_raw 1.9 * 3.5 = 6.65.
    """
    each = alpha / len(action)
    d_u = d_action * (1 - action * action) + 2 * each * action
    d_log_std = d_u * log_std.exp() * noise - each
    return torch.cat([d_u, d_log_std * (0.5 * (LOG_STD_MAX - LOG_STD_MIN)) * (1 - tanh_raw * tanh_raw)], -1)


def min_gradient(q):
    """d_q (2, B) for L = -mean over B of min(Q1, Q2), from q (2, B): -1 / B for the smaller one, 0 for the larger.

    A minimum passes the derivative on to the one that was chosen. (Of two equal ones to Q2; autograd gives both half.)
    Example: q [[1, 5], [2, 3]] -> [[-0.5, 0], [0, -0.5]].
    """
    first = q[0] < q[1]
    return torch.stack([first, ~first]) * (-1 / q.shape[1])


def categorical_gradient(probs, log_probs, q, alpha):
    """The same for Discrete actions: d_logits (B, n), for L = mean over B of

        l = sum over actions of p f,   f = alpha * log p - min(Q1, Q2),   p = softmax(logits)

    By p_k: dl/dp_k = f_k + alpha. And dp_k/dlogit_j = p_k (1 if j = k, else 0) - p_k p_j. In the sum over k, alpha
    cancels, because the p sum to 1:
        d_logit_j = p_j (f_j - l) / B
    The critics are not passed through: no action was drawn, and what they say of all n is the same for any actor.
    probs, log_probs, q (B, n), where q is the minimum of both critics; alpha a number.
    Example: B = 1, two equal chances, q [1, 0], alpha 0: l = -0.5, d_logits [-0.25, 0.25]. Descent favours the first.
    """
    f = alpha * log_probs - q  # (B, n)
    return probs * (f - (probs * f).sum(-1, keepdim=True)) / len(q)


class FlatAdam:
    """torch.optim.Adam's step on one vector of all weights (P,), with its formula, for k = 1, 2, ...:

        m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2      moving averages of the gradient g and of g^2
        w <- w - lr * m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps)
    Averages that begin at 0 are too small at first; the divisors 1 - beta^k correct that (Kingma and Ba, 1412.6980).
    weights: all parameters of the optimiser, in the order in which the vector has them.
    The optimiser stays the owner of weights and averages, which become views: its state_dict() is always up to date.
    trap: load_state_dict() of the optimiser gives it other averages. Make a new FlatAdam then.
    """

    def __init__(self, optimizer, weights):
        self.group, = optimizer.param_groups
        states = [optimizer.state[weight] for weight in weights]  # {} before the first step
        self.weights = flatten(weights)
        self.gradient = torch.zeros_like(self.weights)
        m, v = ([state.get(name, torch.zeros_like(weight)) for state, weight in zip(states, weights, strict=True)]
                for name in ("exp_avg", "exp_avg_sq"))
        self.m, self.v = (torch.cat([part.flatten() for part in parts]) for parts in (m, v))
        # torch counts for each tensor: (tensors,), all the same
        self.steps = torch.stack([torch.as_tensor(state.get("step", 0.0)) for state in states])
        for state, step, *averages in zip(states, self.steps, views(self.m, m), views(self.v, v), strict=True):
            state.update(step=step, exp_avg=averages[0], exp_avg_sq=averages[1])

    def step(self):
        """One step down self.gradient (P,), which backward() has written."""
        lr, (beta1, beta2), eps = (self.group[name] for name in ("lr", "betas", "eps"))
        self.steps.add_(1)
        # The whole formula in one pass over memory: what torch.optim.Adam(fused=True) calls for every tensor.
        torch._fused_adam_([self.weights], [self.gradient], [self.m], [self.v], [], [self.steps[0]], lr=lr, beta1=beta1,
                           beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)


class ByHand:
    """SAC._step of an agent without autograd: tensors of a batch -> the same dict, the same weights but for rounding.

    Weights, averages and generator stay the agent's own: act(), state_dict() and SAC._step see every change.
    trap: whatever replaces one of them (reset_critic, load_state_dict) must make a new ByHand.
    """

    def __init__(self, agent, bfloat16=False):
        self.agent = agent
        critics, targets = (interleaved([twins.q1, twins.q2]) for twins in (agent.critic, agent.target))
        self.actor_adam = FlatAdam(agent.actor_optimizer, [*agent.actor.parameters(), agent.log_alpha])
        self.critic_adam, self.target = FlatAdam(agent.critic_optimizer, critics), flatten(targets)
        self.obs_dim, action_dim, actions, hidden = agent.sizes
        sizes, adam = (self.obs_dim, *hidden, actions or 2 * action_dim), self.actor_adam
        self.actor = Networks(adam.weights[:-1], 1, sizes, adam.gradient[:-1], bfloat16)  # [-1] is log alpha
        self.slow = flatten(list(agent.slow_actor.parameters()))
        # act() asks one network, so without the dimension of the networks
        self.acting, self.acting_slowly = ([(weight[0], bias[0, 0]) for weight, bias in networks.parameters]
                                           for networks in (self.actor, Networks(self.slow, 1, sizes)))
        sizes, adam = (self.obs_dim + action_dim, *hidden, actions or 1), self.critic_adam
        self.critics = Networks(adam.weights, 2, sizes, adam.gradient, bfloat16, self.obs_dim, agent.layer_norm)
        self.targets = Networks(self.target, 2, sizes, bfloat16=bfloat16, layer_norm=agent.layer_norm)

    def __deepcopy__(self, memo):
        return None  # a copy of the agent has its weights elsewhere, and makes its own

    # inference_mode does less than no_grad: torch does not even count how often a tensor was written to. What is
    # returned cannot enter autograd.
    @torch.inference_mode()
    def __call__(self, obs, action, reward, next_obs, terminated):
        agent, batch = self.agent, len(reward)
        both = torch.cat([next_obs, obs]).sub_(agent.obs_mean).div_(agent.obs_std)  # (2B, O)
        next_obs, obs = both.split(batch)
        # The critics' step leaves the actor as it is, so one pass serves s', for y, and s, for the actor's own step.
        output = self.actor.forward(both.unsqueeze(0))  # (1, 2B, ...)
        policy = self._policy(output.squeeze(0), batch)
        next_value, _, _ = self._value(self.targets, next_obs, [x[:batch] for x in policy[:2]])
        y = reward + agent.discount * (1 - terminated) * next_value  # (B,)
        error, q_mean = self._critic_step(obs, action, y)
        value, entropy = self._actor_step(obs, [x[batch:] for x in policy])
        self.target.lerp_(self.critic_adam.weights, agent.tau)  # Polyak: one vector follows another
        self.slow.lerp_(self.actor_adam.weights[:-1], agent.slow)
        return {"critic_loss": error.square().sum() / batch, "actor_loss": -value.mean(), "q_mean": q_mean,
                "alpha": agent.log_alpha.exp(), "entropy": entropy}

    @torch.inference_mode()
    def act(self, obs, explore, layers):
        """SAC.act for a Box: the same action from the same draw, always in float32. obs (O,) -> (A,).

        layers: acting, or acting_slowly.

        For one observation, what torch does around each operation takes the time. So there are few operations, and the
        last ones, of a handful of numbers, are numpy's.
        """
        agent = self.agent
        x = torch.from_numpy((np.asarray(obs, np.float32) - agent.obs_mean.numpy()) / agent.obs_std.numpy())
        for weight, bias in layers[:-1]:
            x = torch.addmv(bias, weight, x).relu_()
        weight, bias = layers[-1]
        output = torch.addmv(bias, weight, x).numpy()
        mean, raw = output[: agent.action_dim], output[agent.action_dim :]
        if not explore:
            return np.tanh(mean)
        std = np.exp(LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (np.tanh(raw) + 1))
        return np.tanh(mean + std * torch.randn(mean.shape, generator=agent.rng).numpy())

    def _policy(self, output, batch):
        """From what the actor gives, (2B, outputs): as SAC._policy does, and what gaussian_gradient() needs besides.

        Box: action (2B, A), log_prob (2B,), and log_std, tanh_raw, noise (2B, A). Discrete: probs, log_probs (2B, n).
        """
        agent = self.agent
        if agent.discrete:
            log_probs = F.log_softmax(output, dim=-1)
            return log_probs.exp(), log_probs
        # contiguous: what lies in strips a few numbers wide, no processor adds or multiplies many at once.
        mean, raw = (half.contiguous() for half in output.chunk(2, dim=-1))
        tanh_raw = torch.tanh(raw)
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (tanh_raw + 1)
        noise = torch.empty_like(mean)
        # trap: two draws, as sac.py makes two. A single one of (2B, A) would give other numbers.
        noise[:batch].normal_(generator=agent.rng), noise[batch:].normal_(generator=agent.rng)
        return *tanh_gaussian(mean, log_std, noise), log_std, tanh_raw, noise

    def _values(self, critics, obs, *action):
        """Both critics, like TwinCritic: (2, B), or (2, B, n) of all Discrete actions."""
        q = critics.forward(torch.cat([obs, *action], dim=-1).expand(2, -1, -1))
        return q.squeeze(-1) if action else q

    def _value(self, critics, obs, policy):
        """V(s) of the policy and its entropy (B,), by SAC's own formula; and what _values() gives."""
        q = self._values(critics, obs, *([] if self.agent.discrete else policy[:1]))
        return *self.agent._value(lambda *_: q, obs, policy[:2]), q

    def _critic_step(self, obs, action, y):
        """A step down L = sum over both critics of the mean over B of (Q - y)^2. So d_Q = 2 (Q - y) / B, (2, B).

        action (B, A) or (B,), as stored; y (B,) -> Q - y (2, B), mean Q.
        """
        if not self.agent.discrete:
            q = self._values(self.critics, obs, action)
            d_q = (q - y).unsqueeze(-1) * (2 / len(y))  # (2, B, 1)
        else:
            every = self._values(self.critics, obs)  # (2, B, n)
            taken = action.expand(2, -1).unsqueeze(-1)
            q = every.gather(-1, taken).squeeze(-1)
            # The values of the actions that were not taken are in no loss: their derivative is 0.
            d_q = torch.zeros_like(every).scatter_(-1, taken, (q - y).unsqueeze(-1) * (2 / len(y)))
        self.critics.backward(d_q)
        self.critic_adam.step()
        return q - y, q.mean()

    def _actor_step(self, obs, policy):
        """A step down L = mean over B of (alpha * log pi - min(Q1, Q2)) for the actor, and down alpha's loss.

        policy: of these obs, as _policy() gives it -> V (B,), mean entropy.
        """
        agent, alpha = self.agent, float(self.agent.log_alpha.exp())
        value, entropy, q = self._value(self.critics, obs, policy)
        if agent.discrete:
            d_output = categorical_gradient(*policy, q.amin(0), alpha)
        else:
            # The critics are only passed through, down to the action in their input (obs, action): (2, B, A).
            d_action = self.critics.backward(min_gradient(q).unsqueeze(-1), to_weights=False)
            action, _, *rest = policy
            d_output = gaussian_gradient(d_action.sum(0), action, *rest, alpha)
        self.actor.backward(d_output.unsqueeze(0))
        # Alpha's loss is log_alpha * (entropy - target), with the entropy as a constant. Its derivative is the factor.
        entropy = entropy.mean()
        self.actor_adam.gradient[-1] = entropy - agent.target_entropy
        self.actor_adam.step()
        return value, entropy


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
    """SAC with gradients by hand on a CPU (its hidden layers in bfloat16 or not), or with recorded updates on a GPU.

    record: Recorded, on a GPU. Batches must then be of one size, and an update overwrites what the last one returned.
    What state_dict() gives, SAC can load, and the other way round.
    trap: networks and optimisers may be replaced only by the methods below, not from outside.
    """

    def __init__(self, *args, bfloat16=False, record=None, **settings):
        self.network = HalfMLP if bfloat16 else MLP
        self.bfloat16, self.record = bfloat16, record
        super().__init__(*args, **settings)

    def _adam(self, parameters):
        lr = self.lr if self.device.type == "cpu" else torch.tensor(self.lr, device=self.device)
        return adam(parameters, lr, self.device)

    def set_learning_rate(self, share):
        if self.device.type == "cpu":
            super().set_learning_rate(share)
            return
        # trap: a recorded step reads the tensor that was there, so the number must be written into that tensor
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"].fill_(share * self.lr)

    def _record_anew(self):
        # trap: a replay works on the tensors it was recorded with, and so does ByHand. Whatever replaces one (critics,
        # the mean and deviation of observations, an optimiser that was loaded) must come through here.
        self._recorded = self.record and self.record(super()._step, self.device, self.rng)
        self._by_hand = None

    def _step(self, *tensors):
        if self.record or self.device.type != "cpu":
            return (self._recorded or super()._step)(*tensors)
        return self._hands()(*tensors)

    def act(self, obs, explore=True, actor=None):
        if self.record or self.device.type != "cpu" or self.discrete:
            return super().act(obs, explore, actor)
        hands = self._hands()
        return hands.act(obs, explore, hands.acting if actor is None else hands.acting_slowly)

    def _hands(self):
        """The ByHand of the present tensors, made where there is none."""
        if self._by_hand is None:
            self._by_hand = ByHand(self, self.bfloat16)
        return self._by_hand

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
        return adam(self._parameter_groups(lr), lr, self.device)

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
