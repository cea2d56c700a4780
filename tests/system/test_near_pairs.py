"""A draft that lacks the target's last tokens, or rows of its table, drafts over gRPC and stays."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from actors.drafter import DraftActor
from actors.launch.prepare import check_models
from actors.rpc.client import GrpcTarget
from actors.rpc.endpoints import Endpoint
from actors.target import TargetActor
from runtime.config import DrafterConfig, Placement, ScheduleConfig, TargetConfig
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from tests.support.pair import save_model

TOKENS = 4096  # of the draft
HERE = Placement(threads=1)


def widened(small: Path, folder: Path, rows: int, added: str | None) -> Path:
    """The same model with more rows in its tables, and perhaps a token more."""
    folder.mkdir()
    settings = json.loads((small / "config.json").read_text("utf-8"))
    settings["vocab_size"] += rows
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    weights = load_file(small / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:rows].flip(1)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(small)
    if added is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [added]})
    tokenizer.save_pretrained(folder)
    return folder


async def said(address: str, request: Request) -> list[Chunk]:
    client = GrpcTarget(address)
    try:
        return [chunk async for chunk in client.generate(request)]
    finally:
        await client.close()


@pytest.mark.parametrize("added", ["<|im_end|>", None], ids=["a token more", "rows alone"])
def test_it_drafts_and_changes_nothing(added: str | None, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small")
    big = widened(small, tmp_path / "big", 64, added)
    found = check_models(build_deployment(str(big), (str(small),), 1, "auto", "cpu", local=True))
    assert len(found.warnings) == (added is not None)
    drafter = DraftActor(
        DrafterConfig(name="d", model=str(small), device="cpu", placement=HERE), str(big)
    )
    # A schedule that never lets its drafters rest, whatever they cost.
    schedule = ScheduleConfig(policy="amusd")
    target = TargetActor(
        TargetConfig(model=str(big), device="cpu", placement=HERE, schedule=schedule)
    )
    # A token that the draft lacks is in the prompt and likely; rows alone are chosen by chance.
    prompt, bias = ((5, TOKENS, 77), ((TOKENS, 6.0),)) if added else ((5, 77), ())
    sampling = SamplingParams(
        max_tokens=200, temperature=0.9, seed=1, ignore_eos=True, logit_bias=bias
    )
    try:
        place = drafter.start()
        target.start()
        target.drafters([Endpoint("d", place.address, 0)])
        on, off = (
            asyncio.run(said(target.address, Request(name, prompt, sampling, speculation)))
            for name, speculation in (("on", True), ("off", False))
        )
        tokens = [token for chunk in on for token in chunk.tokens]
        assert tokens == [token for chunk in off for token in chunk.tokens]
        assert len(tokens) == 200
        assert max(tokens) >= TOKENS
        assert on[-1].stats is not None
        assert on[-1].stats.accepted > 20
        assert target.attached() == ["d"]
        assert not drafter.host.draft_engine.counters["failed"]
        (link,) = target.links.values()
        assert not link.counters
    finally:
        drafter.stop()
        target.stop()
