"""Starting a Ray of one's own, whose node may not come up."""

from typing import Any

import pytest
import ray

from actors.fleet.ray_session import ray_cluster
from runtime.core.errors import Unavailable

HUNG = "The current node timed out during startup. This could happen because the raylet failed."


class Starts:
    """Ray's `init`, which raises these errors one after the other, then starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.calls, self.ends = list(errors), list[dict[str, Any]](), 0
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.errors:
            raise self.errors.pop(0)

    def shutdown(self) -> None:
        self.ends += 1


def test_a_node_that_does_not_come_up_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, Exception(HUNG))
    with ray_cluster(None, cpus=3):
        assert starts.ends == 1
    assert [call["num_cpus"] for call in starts.calls] == [3, 3]
    assert starts.calls[0] == starts.calls[1]
    assert starts.ends == 2


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ((Exception(HUNG), Exception(HUNG)), 2),
        ((Exception("GCS is overloaded"),), 1),
        ((OSError("no space left"),), 1),
    ],
)
def test_a_ray_that_does_not_start_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, errors: tuple[Exception, ...], calls: int
) -> None:
    starts = Starts(monkeypatch, *errors)
    with (
        pytest.raises(Unavailable, match=r"Ray does not start on this machine .* --in-process"),
        ray_cluster(None),
    ):
        pass
    assert len(starts.calls) == calls
