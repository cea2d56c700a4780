"""The speed-ups that the papers of the drafting methods report, for comparison with the
measurements."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper's report.

    method        its name in the table
    min_speed_up  the smallest claimed speed-up over plain decoding, or None
    setup         the models, hardware and tasks of the paper
    difference    why ours may be slower
    """

    method: str
    title: str
    source: str
    min_speed_up: float | None
    reported: str
    setup: str
    difference: str


PAPERS = (
    Paper(
        "model",
        "Direct alignment of draft models",
        "arXiv 2403.00858",
        None,
        "up to 2.4 x, 2.3 tokens per step",
        "Llama-2-chat 7B with a draft of 115M",
        "the claim is a best case; at temperature 0.8 the shipped draft guesses half of the "
        "tokens, "
        "because it is small and briefly trained",
    ),
    Paper(
        "model",
        "Decoding speculative decoding",
        "arXiv 2402.01528",
        None,
        "throughput up by as much as 111% with a draft shaped for the hardware instead of an "
        "existing "
        "one",
        "LLaMA-65B, OPT-66B",
        "not a comparison with plain decoding; `outrider tune shapes` draws the curve of latency "
        "against acceptance",
    ),
    Paper(
        "ngram",
        "Prompt lookup decoding",
        "github.com/apoorvumang/prompt-lookup-decoding",
        2.0,
        "2 to 4 x where the answer repeats the prompt",
        "Mistral-7B-Instruct, one A100 of 40 GB, greedy; summaries, questions on a text, chats of "
        "several turns",
        "continuing a file repeats less of it than a summary or an edit does",
    ),
    Paper(
        "layer-skip",
        "Draft & Verify",
        "arXiv 2309.08168",
        None,
        "up to 1.99 x",
        "Llama-2 and its variants; layers by Bayesian search, no training",
        "all 9 layers of the target matter: half of them agree with the whole far less often "
        "than 40 "
        "or more out of 80 do",
    ),
    Paper(
        "layer-skip",
        "LayerSkip",
        "arXiv 2404.16710",
        1.82,
        "1.82 x on code, 2.0 x parsing, 2.16 x summaries",
        "Llama models trained for it (dropout of layers, a loss at every exit)",
        "this target was trained without either",
    ),
    Paper(
        "s3d",
        "S3D",
        "arXiv 2405.20314",
        None,
        "1.4 to 2 x as fast as EAGLE, both quantized",
        "Phi-3 and Llama-2, GPUs with little memory (A10G)",
        "its summary does not compare with plain decoding; here it is trained for minutes, "
        "on a target "
        "with few layers",
    ),
    Paper(
        "token-recycling",
        "Token recycling",
        "arXiv 2408.08696",
        2.0,
        "about 2 x at every size",
        "Vicuna 7B to 33B, a tree of some 80 nodes, less than 2 MB",
        "there a step of 80 rows takes hardly longer than a step of one row; on a core that "
        "computes "
        "in float32 every row costs time, and the table starts empty",
    ),
    Paper(
        "medusa",
        "Medusa",
        "arXiv 2401.10774",
        2.2,
        "Medusa-1, whose target is frozen as here, more than 2.2 x; Medusa-2 2.3 to 2.8 x "
        "(3.6 x in "
        "the first version)",
        "Vicuna 7B and 13B, a batch of one",
        "the heads here share the target's unembedding and saw 0.9 million tokens; rows cost "
        "time on a "
        "CPU but are almost free on a GPU",
    ),
    Paper(
        "hidden-transfer",
        "Hidden transfer",
        "arXiv 2404.12022",
        None,
        "faster than Medusa and self-speculative decoding",
        "Llama-2-chat and Vicuna models",
        "the maps saw 0.3 million tokens, and on a CPU pseudo rows cost as much as verified rows",
    ),
    Paper(
        "hidden-transfer",
        "FIRP, its successor",
        "arXiv 2410.20488",
        1.9,
        "1.9 to 3 x",
        "several models and data sets",
        "as above",
    ),
)
