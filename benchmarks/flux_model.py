"""A whole FLUX-shaped model and its three ways to run a step: eager, compiled, a CUDA graph."""

from __future__ import annotations

import time

import flux
import torch

from distill.roofline import account_of, work

TOKENS = {"tiny": (16, 8)}
WRONG = 0.15  # an RMS error that rounding does not explain


class Model:
    """A model with its inputs and its three ways to run a step."""

    def __init__(self, name, session):
        self.name, self.device, self.size = name, session.device, session.size
        self.image, self.text = TOKENS.get(session.size, (4096, 512))
        self.model = flux.build(name, session.size, self.device)
        if session.attention:
            self.model.set_attention_backend(session.attention)
        self.kwargs = flux.inputs(self.model, self.image, self.text, self.device)
        self.bytes = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        self.work = work(self.model, self.image, self.text)
        self.account = account_of(self.model, self.image, self.text)
        self.record: dict = {"modes": {}}
        self.error = 0.0

    def compile(self) -> None:
        backend = "aot_eager" if self.size == "tiny" else "inductor"
        self.model.compile_repeated_blocks(backend=backend, dynamic=False)

    def uncompile(self) -> None:
        for module in self.model.modules():
            module._compiled_call_impl = None

    def step(self):
        return self.model(**self.kwargs)

    def graph(self):
        """Replays a captured step; raises where a step cannot be captured.

        The step reads self.kwargs and leaves its velocity in self.velocity, `graph_bytes` is the
        most that capture and one replay hold beyond what was there before.
        """
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        if getattr(getattr(self.model, "d2m_config", None), "mob", None) is not None:
            raise RuntimeError("the block router's choice is read on the host")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.velocity = self.step()[0]
        graph.replay()
        torch.cuda.synchronize(self.device)
        self.graph_bytes = torch.cuda.max_memory_allocated(self.device) - before
        error = rms_error(self.velocity, self.step()[0])
        if not error < WRONG:
            raise RuntimeError(f"a replay is off by {error:.3g} of the step it was captured from")
        return graph.replay

    def image_seconds(self, steps: int, replay=None) -> float:
        """Seconds of `steps` Euler steps in a row, from idle to idle."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        if replay is None:
            flux.denoise(self.model, self.kwargs, steps)
        else:
            flux.denoise_replayed(self.kwargs, replay, self.velocity, steps)
        synchronize()
        return time.perf_counter() - start


def rms_error(got, want) -> float:
    """RMS of the difference over RMS of `want`."""
    got, want = got.float(), want.float()
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()
