"""Records a pass of fixed shapes and addresses as a CUDA graph: one launch instead of hundreds."""

from collections.abc import Callable

import torch

Run = Callable[[], torch.Tensor]
Record = Callable[[Run], Run]

# Libraries choose kernels and allocate workspaces in warm-up runs; during a capture they may not.
WARM_UP_RUNS = 2


def run_eagerly(function: Run) -> Run:
    """Return the function unchanged, for devices without graphs."""
    return function


class GraphCapture:
    """Records functions on one device; their graphs share one memory pool.

    All inputs and outputs stay at their addresses. The result of a replay is valid until the next
    replay of any of the graphs, so copy what must be kept. Warm-up runs call a function several
    times: calls with the same input must have the same effect. Raises RuntimeError for a function
    that cannot be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Run) -> Run:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_RUNS):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Threads of other models may allocate meanwhile: only this thread must not.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
