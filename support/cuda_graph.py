"""One launch instead of hundreds: a function of tensors, recorded as a CUDA graph and replayed.

What this is: for networks this small, Python needs longer to launch the kernels of an update than
the GPU to run them. A graph remembers the launches, with all addresses, and repeats them at once:
the same numbers. On an H100 SAC then updates 13 times as often (results/bench_cuda.csv).
Which STEPs: 4 fit the reward model, 6 improve the policy; off by default: --cuda-graph 1.
Differs from the paper: it names no such thing.
Shapes: whatever the function takes, but always the same.  Names: Recorded.  Only torch.

To use it elsewhere (on a GPU):
    import torch
    from support import cuda_graph
    weight = torch.zeros(3, device="cuda")
    def step(x):
        weight.add_(x)  # in place: a replay works on the tensors it was recorded with
        return weight.sum()
    step = cuda_graph.Recorded(step, "cuda")
    print([float(step(torch.ones(3))) for _ in range(6)])  # 3, 6, 9, 12, 15, 18
"""
import torch


class Recorded:
    """function(*tensors) -> tensors, recorded at the fourth call and replayed from then on.

    The first three are made as usual: optimisers make their moments, libraries their plans.
    Tensors may come from anywhere; they are copied to where the recording reads them. What a call
    returns is overwritten by the next one.  generator: the random numbers that function draws.
    trap: whatever *replaces* a tensor that the function uses, instead of writing to it (new
    weights, an optimiser that was loaded), is not seen by a replay: make a new Recorded then.
    trap: a replay repeats kernels, not Python: numbers (a learning rate), ifs, prints and what
    numpy draws stay as they were at the recording.
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
            if self.generator is not None:  # trap: torch records no draws of one it was not told of
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):  # nothing is computed yet
                self.outputs = self.function(*self.inputs)
        for tensor, place in zip(tensors, self.inputs, strict=True):
            # trap: copy_ would stretch a batch of one over the whole, and convert other types
            assert (tensor.shape, tensor.dtype) == (place.shape, place.dtype), (
                tensor.shape, tensor.dtype)
            # pinned: or the copy would wait until the GPU has done all it was given
            tensor = tensor if tensor.is_cuda else tensor.pin_memory()
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs
