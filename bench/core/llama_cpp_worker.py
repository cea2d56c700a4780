"""The worker of llama.cpp: a script for the Python of an environment that has llama-cpp-python.

It imports nothing of this project. It reads one JSON object per line and answers each with one:

    {"convert": FILE}                                     -> {}
    {"guesses", "prompts", "max_tokens", "temperature", "seed"}
        -> {"outputs", "seconds", "first_seconds", "first_tokens"}

Arguments: the GGUF file, the number of threads, the slots of the context.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found,unused-ignore]
from llama_cpp.llama_speculative import (  # type: ignore[import-not-found,unused-ignore]
    LlamaPromptLookupDecoding,
)

BFLOAT16_FILE = 32  # LLAMA_FTYPE_MOSTLY_BF16 in llama.h


def convert(source: str, destination: str) -> None:
    """Write the GGUF file with all matrices in bfloat16. Raises RuntimeError."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = BFLOAT16_FILE, True, 0
    if llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp cannot convert {source}")


def answer(model: Any, prompt: list[int], job: dict[str, Any]) -> dict[str, Any]:
    """Continue one prompt; times in seconds from the call on."""
    ends = {llama_cpp.llama_vocab_eos(llama_cpp.llama_model_get_vocab(model.model))}
    ends.add(llama_cpp.llama_vocab_eot(llama_cpp.llama_model_get_vocab(model.model)))
    model.reset()
    model.set_seed(job["seed"])
    output: list[int] = []
    first = began = time.perf_counter()
    for token in model.generate(
        prompt,
        temp=job["temperature"],
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repeat_penalty=1.0,
    ):
        output.append(int(token))
        if len(output) == 1:
            first = time.perf_counter()
        if len(output) == job["max_tokens"] or token in ends:
            break
    return {
        "outputs": [output],
        "seconds": time.perf_counter() - began,
        "first_seconds": first - began,
        "first_tokens": 1,
    }


def main() -> None:
    file, threads, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    models: dict[int, Any] = {}  # by the number of guesses
    for line in sys.stdin:
        job = json.loads(line)
        if "convert" in job:
            convert(file, job["convert"])
            found: dict[str, Any] = {}
        else:
            guesses = job["guesses"]
            if guesses not in models:
                lookup = LlamaPromptLookupDecoding(num_pred_tokens=guesses) if guesses else None
                models[guesses] = llama_cpp.Llama(
                    file,
                    n_ctx=slots,
                    n_threads=threads,
                    n_threads_batch=threads,
                    draft_model=lookup,
                    verbose=False,
                )
            (prompt,) = job["prompts"]
            found = answer(models[guesses], prompt, job)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
