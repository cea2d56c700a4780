"""Builds valid tokenizers of kinds that the grammar library does not read."""

from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, Whitespace
from transformers import PreTrainedTokenizerFast


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "cat": 3}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return fast(made)


def unigram() -> PreTrainedTokenizerFast:
    words = ["<unk>", "</s>", "\u2581the", "\u2581cat", "a"]
    made = Tokenizer(Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    made.pre_tokenizer, made.decoder = Metaspace(), MetaspaceDecoder()
    return fast(made)


ODD_TOKENIZERS = {"word level": word_level, "unigram": unigram}
