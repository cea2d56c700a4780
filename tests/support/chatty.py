"""A tiny target with a chat template, whose turns end now and then."""

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.support.pair import save_model

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def save_chatty(folder: Path, context: int = 256, often: float = 6.7) -> Path:
    """A model that ends its turn the more often the larger `often` is.

    All embeddings share one large coordinate, which the final norm keeps, so that it is the bias of
    the end's logit.
    """
    save_model(folder, num_hidden_layers=3, context=context)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 30.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[0] = 0.0
        model.lm_head.weight[0, 0] = often
    model.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder
