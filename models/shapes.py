"""The two models of the pair: what they are made of and how long they learn."""

from dataclasses import dataclass

from transformers import LlamaConfig

VOCABULARY = 4096
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    layers: int
    intermediate: int

    def config(self, end_of_text: int) -> LlamaConfig:
        heads = self.hidden // 64
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )


TARGET = Shape(hidden=256, layers=9, intermediate=704)  # 8.3M parameters
DRAFT = Shape(hidden=128, layers=2, intermediate=384)  # 0.95M parameters
