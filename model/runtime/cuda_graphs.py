"""Work of equal shapes captured once as a CUDA graph and replayed.

A cached chunk of test-time training (`model.ttt`), or a token of the calibration text
(`model.quantization.calibration_text`), is hundreds of kernels of microseconds, which take longer
to launch than to run; a graph launches them at once. The first call of all runs as it is, which
takes what libraries take once. Any other first call of a key is captured, which takes as long as
Python takes to run it, and is replayed at once, as are all later ones. The work may read and write
only memory that stays in place, and its shapes may depend on the key alone.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GraphRunner:
    """Runs work by key; captured=False runs everything as it is."""

    def __init__(self, captured: bool) -> None:
        self.captured, self._begun = captured, False
        self._known: dict[Hashable, Callable[[], Tensor]] = {}

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Where all work must run: recording and running as it is share one stream."""
        yield

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Do the work, or what was captured under `key`; the result is valid until the next run."""
        if not self.captured or not self._begun:
            self._begun = True
            return work()
        if key not in self._known:
            self._known[key] = self._record(work)
        return self._known[key]()

    def _record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return work


class CUDAGraphRunner(GraphRunner):
    """GraphRunner by CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(captured=True)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own, as recording demands, and what memory others have left unused."""
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which waits for the device and empties the allocator every time.
        # Relaxed, as kernels that the work is the first to use are loaded meanwhile.
        graph.capture_begin(self._pool, capture_error_mode="relaxed")
        try:
            result = work()
        finally:
            graph.capture_end()

        def play() -> Tensor:
            graph.replay()
            return result

        return play
