"""Work of fixed shapes, captured once as a CUDA graph and replayed.

A cached chunk of test-time training (`model.ttt`), or a token of the calibration text
(`model.quantization.calibration_text`), is hundreds of kernels of a few microseconds, whose launch
overhead dominates; a graph launches them all at once. The very first call runs eagerly, so that
libraries initialize outside a capture. Any other first call with a key is captured and replayed,
later ones are replayed. The work may read and write only memory at fixed addresses (static
buffers), and its shapes may depend on the key alone.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GraphRunner:
    """Runs work by key; this base class, and captured=False, run everything eagerly."""

    def __init__(self, captured: bool) -> None:
        self.captured, self._initialized = captured, False
        self._graphs: dict[Hashable, Callable[[], Tensor]] = {}

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Context in which all work must run: capture and eager calls share one stream."""
        yield

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Run the work, or replay the graph of `key`; the result is valid until the next run."""
        if not self.captured or not self._initialized:
            self._initialized = True
            return work()
        if key not in self._graphs:
            self._graphs[key] = self._capture(work)
        return self._graphs[key]()

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return work


class CUDAGraphRunner(GraphRunner):
    """GraphRunner with CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(captured=True)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A side stream, as capture demands; cached memory is released for its pool."""
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which synchronizes and empties the allocator's cache every time.
        # Relaxed, as kernels that are used for the first time are loaded during the capture.
        graph.capture_begin(self._pool, capture_error_mode="relaxed")
        try:
            result = work()
        finally:
            graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def graph_runner(device: torch.device, cuda_graphs: bool) -> GraphRunner:
    """The runner for `device`: CUDA graphs if wanted and it is a GPU, else eager."""
    captured = cuda_graphs and device.type == "cuda"
    return CUDAGraphRunner(device) if captured else GraphRunner(captured=False)
