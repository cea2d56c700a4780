"""The folder and the shapes of the two models of the pair."""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from training.shapes import llama_config

MODELS = Path(str(importlib.resources.files("models")))
VOCABULARY = 4096
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class PairShape:
    hidden: int
    layers: int
    intermediate: int

    def config(self, end_of_text: int) -> LlamaConfig:
        return llama_config(
            self.hidden, self.layers, self.intermediate, VOCABULARY, CONTEXT, end_of_text
        )


TARGET = PairShape(hidden=256, layers=9, intermediate=704)  # 8.3M parameters
DRAFT = PairShape(hidden=128, layers=2, intermediate=384)  # 0.95M parameters
