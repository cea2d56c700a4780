"""A list of calls runs in order, each on its threads."""

import numpy as np
import pytest
import torch

from runtime.kernels.call_list import CALL, addresses, function_address, run_calls, structs
from runtime.kernels.jit import is_supported
from runtime.kernels.llvm_rows import RowArguments
from runtime.kernels.rowwise import load_row_kernels

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")


@pytest.mark.parametrize("several", [1, 2, 5])
def test_each_call_finds_what_the_one_before_left(several: int) -> None:
    rows = torch.randn(40, 32)
    steps = torch.empty(6, 40, 32)
    arguments = structs(
        RowArguments,
        6,
        rows=[rows.data_ptr(), *(step.data_ptr() for step in steps[:5])],
        out=[step.data_ptr() for step in steps],
        stride=32,
        count=40,
        pieces=1,
        size=32,
        out_stride=32,
        work_items=several,
        next=77,
    )
    calls = np.zeros((2, 3), CALL)
    calls["function"] = function_address(load_row_kernels().convert[torch.float32])
    calls["arguments"], calls["work_items"] = addresses(arguments).reshape(2, 3), several
    run_calls(calls[:1])
    assert torch.equal(steps[2], rows)
    steps[2] = 1
    run_calls(calls[1:])
    assert torch.equal(steps[5], torch.ones(40, 32))
