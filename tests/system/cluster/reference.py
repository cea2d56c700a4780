"""Computes the plain-decoding answers to requests, in this process without drafters."""

import asyncio
from typing import Any

from actors.compose import build_target
from runtime.config import TargetConfig
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.model_paths import bundled_model
from runtime.models.loader import load_tokenizer

PROMPTS = ("def copy_file(src, dst):\n", "import os\n\n\nclass Reader:\n", "for name in sorted(")


def cases(max_tokens: int) -> list[dict[str, Any]]:
    """Each with `request`, the arguments of openai's `completions.create`, and `text`."""
    tokenizer = load_tokenizer(bundled_model("target"))
    asked = [
        Request(
            f"{number}-{temperature}",
            tuple(tokenizer.encode(prompt)),
            sampling(max_tokens, temperature, number),
            speculation=False,
        )
        for number, prompt in enumerate(PROMPTS)
        for temperature in (0.0, 0.8)
    ]
    return [
        {"request": body(request), "text": text}
        for request, text in zip(asked, asyncio.run(answers(asked)), strict=True)
    ]


def sampling(max_tokens: int, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True
    )


def body(request: Request) -> dict[str, Any]:
    asked = request.sampling
    known = {
        "prompt": list(request.prompt),
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
    }
    return known | {"extra_body": {"ignore_eos": asked.ignore_eos}}


async def answers(requests: list[Request]) -> list[str]:
    target = build_target(
        TargetConfig(model=bundled_model("target"), dtype="float32", kv_tokens=8192)
    ).target
    target.start()
    try:
        return [
            "".join([piece async for chunk in target.generate(request) for piece in chunk.pieces])
            for request in requests
        ]
    finally:
        await target.stop()
