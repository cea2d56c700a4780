"""The divergence of two distributions with one unembedding."""

import pytest
import torch
from torch.nn import functional as F

from training import frozen_kl


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_value_and_gradient_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(frozen_kl, "CHUNK_LOGITS", 5 * 300)  # some chunks, the last one smaller
    generator = torch.Generator().manual_seed(rows)
    guess, truth, unembedding = (torch.randn(n, 16, generator=generator) for n in (rows, rows, 300))
    found, known = guess.clone().requires_grad_(), guess.clone().requires_grad_()
    value = frozen_kl.frozen_kl(found, truth, unembedding)
    (value * 3).backward()
    wanted = F.kl_div(
        F.linear(known, unembedding).log_softmax(-1),
        F.linear(truth, unembedding).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    (wanted * 3).backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(found.grad, known.grad)


def test_no_rows_have_no_divergence() -> None:
    none = torch.zeros(0, 16, requires_grad=True)
    value = frozen_kl.frozen_kl(none, torch.zeros(0, 16), torch.ones(300, 16))
    value.backward()
    assert value == 0
    assert none.grad is not None


def test_products_are_of_the_type_of_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    guess, truth, unembedding = (torch.randn(n, 16, generator=generator) for n in (30, 30, 300))
    exact = frozen_kl.frozen_kl(guess, truth, unembedding)
    rounded = frozen_kl.frozen_kl(guess, truth, unembedding.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = frozen_kl.frozen_kl(guess, truth, unembedding)
    assert found == rounded != exact
