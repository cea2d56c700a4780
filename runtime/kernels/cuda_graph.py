"""A pass of fixed shapes and addresses as one CUDA graph: a replay is one launch instead of hundreds."""

from collections.abc import Callable

import torch

Run = Callable[[], torch.Tensor]
Record = Callable[[Run], Run]

WARM_UP_RUNS = 2  # libraries choose their kernels and take their work space before a capture, during which they may not


def run_eagerly(function: Run) -> Run:
    """Nothing is recorded: the function itself, on devices without graphs."""
    return function


class GraphCapture:
    """Records functions on one device. All that they read and write lies where it lay; their graphs share one pool of memory.

    So what a replay returned is valid until the next replay of any of them: copy what is to be kept. A function must do the same when
    it is called again on the same input, since warm-ups run it. Raises RuntimeError for one that cannot be captured.
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
            # Threads of other models may allocate meanwhile: only what this thread does is forbidden to disturb the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
