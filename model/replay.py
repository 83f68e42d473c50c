"""Work of equal shapes recorded once as a CUDA graph and replayed.

A cached chunk of test-time training (`model.ttt`), or a token of the calibration text
(`model.generate`), is hundreds of kernels of microseconds, which take longer to launch than to run;
a graph launches them at once. The first call of a key runs as it is, which also compiles what is
compiled and loads its kernels; the second is recorded; it and the later
ones are replayed. The work may read and write only memory that stays in place, and its shapes may
depend on the key alone.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Replay:
    """Runs work by key; recorded=False runs everything as it is."""

    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded
        self._known: dict[Hashable, Callable[[], Tensor] | None] = {}

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Where all work must run: recording and running as it is share one stream."""
        yield

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Do the work, or what was recorded under `key`; the result is valid until the next run.

        key: None for work that is not worth recording.
        """
        if key is None or not self.recorded:
            return work()
        if key not in self._known:
            self._known[key] = None
            return work()
        play = self._known[key]
        if play is None:
            play = self._known[key] = self._record(work)
        return play()

    def _record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return work


class CUDAReplay(Replay):
    """Replay by CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(recorded=True)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own, as recording demands."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = work()

        def play() -> Tensor:
            graph.replay()
            return result

        return play


def rows_at(count: int, capacity: int) -> int:
    """Rows to run for `count` documents: a power of two, above 64 also three halves of one, or all.

    Few different numbers, so that few graphs are recorded; few rows take as long as twice as many.
    """
    power = 1 << (count - 1).bit_length()
    between = power * 3 // 4
    return min(capacity, between if count <= between and power > 64 else power)
