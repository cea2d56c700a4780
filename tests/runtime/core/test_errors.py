"""A failure of another library at a start becomes one line that names the model."""

import pytest

from runtime.core.errors import ModelRefused, PairMismatch, naming


def test_a_failure_of_another_library_names_the_model_and_the_way_out() -> None:
    with pytest.raises(ModelRefused) as refused, naming("big/one"):
        raise ValueError("no\n  decoder")
    assert str(refused.value) == (
        "model big/one cannot be started (ValueError: no decoder): choose another model, "
        "or give it more memory if that is the reason"
    )
    assert isinstance(refused.value.__cause__, ValueError)


def test_our_own_errors_and_interruptions_stay_as_they_are() -> None:
    for error in (PairMismatch("other words"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, naming("big"):
            raise error
        assert raised.value is error
