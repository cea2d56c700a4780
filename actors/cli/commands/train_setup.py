"""Prepares a training: its order, its texts, and the texts that the target generates."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from actors.cli.commands.options import Device
from actors.launch.serving import serving
from runtime.core.cache_folder import cache_folder
from runtime.core.sampling_params import check_int
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model

if TYPE_CHECKING:
    from runtime.core.messages import Request, Tokens
    from training.acceptance import HeldOutAcceptance
    from training.conversations import OwnText
    from training.eagle_run import EagleData
    from training.loop import StepCallback
    from training.outputs import TargetText
    from training.progress import ProgressBar
    from training.run import TrainingData, TrainingJob
    from training.teacher import Teacher
    from training.text import Corpus, Document

MAX_STEPS = 10_000_000
MAX_BATCH = 4096
MAX_OWN_TOKENS = 10_000_000_000


def make_order(
    method: str,
    target: str | None,
    out: Path,
    settings: dict[str, Any],
    steps: int,
    batch: int,
    context: int,
    own: int,
    seed: int,
) -> "TrainingJob":
    from training.run import TrainingJob

    check_int("steps", steps, 1, MAX_STEPS)
    check_int("batch", batch, 1, MAX_BATCH)
    check_int("own", own, 0, MAX_OWN_TOKENS)
    check_int("seed", seed, 0, 2**31 - 1)
    return TrainingJob(
        method,
        target or bundled_model("target"),
        out.absolute(),
        settings,
        steps,
        batch,
        context,
        own,
        seed,
    )


@contextmanager
def prepare_training(
    order: "TrainingJob",
    data: list[Path] | None,
    device: Device,
    check: "Callable[[Teacher], None]" = lambda teacher: None,
) -> Iterator[tuple["TrainingData", Path, "StepCallback"]]:
    """Yields the training material, the working folder, and a function that reports each step.

    Everything invalid is refused before anything is written. `check` raises if the method cannot
    use the target.
    """
    import torch

    from actors.launch.prepare import context_length
    from training import folder, outputs, text
    from training.conversations import packed
    from training.progress import ProgressBar
    from training.run import TrainingData, check_context
    from training.teacher import fingerprint, load_teacher

    threads = torch.get_num_threads()
    folder.check_out_is_free(order.out)
    longest = context_length(order.target)
    context = check_context(order.context, longest)
    texts = read_documents(data)
    with ProgressBar() as bar:
        bar.note("loading the target")
        teacher = load_teacher(order.target, device.value)
        check(teacher)
        corpus = text.build_corpus(
            texts, teacher.tokenizer.backend_tokenizer, teacher.tokenizer.eos_token_id, 2 * context
        )
        target = fingerprint(order.target)
        learn, hold = (
            outputs.training_requests(corpus, order.own, context, order.seed),
            outputs.held_out_requests(corpus, context, order.seed),
        )
        with folder.open_work(order.out, order.recipe(target, corpus.digest)) as work:
            if order.own and teacher.tokenizer.chat_template is not None:
                made, prompts = conversations(order, teacher, target, bar)
                own = packed(made, context)
                hold = outputs.prompt_requests(prompts, "held-out", longest, order.seed)
            else:
                own = outputs.rows_of(
                    target_texts(
                        order.target, device, learn, outputs.folder_name(target, learn), bar
                    )
                )
            held_out = target_texts(
                order.target, device, hold, outputs.folder_name(target, hold), bar
            )
            torch.set_num_threads(threads)  # the runtime has changed it
            yield (
                TrainingData(teacher, corpus, own, held_out),
                work,
                bar.steps(order.steps),
            )


@contextmanager
def prepare_eagle(
    order: "TrainingJob", data: list[Path] | None, prompts: Path | None, device: Device
) -> Iterator[tuple["EagleData", Path, "ProgressBar"]]:
    """Yields what EAGLE learns from, the working folder, and the progress bar.

    The texts are the target's own, and excerpts of the data if any is given. A target without a
    chat template needs data: it writes how their excerpts continue.
    """
    import torch

    from actors.launch.prepare import context_length
    from training import folder, outputs, text
    from training import prompts as given
    from training.eagle_run import HELD_OUT_PROMPTS, EagleData, data_texts
    from training.progress import ProgressBar
    from training.run import check_context
    from training.teacher import fingerprint, load_teacher

    threads = torch.get_num_threads()
    folder.check_out_is_free(order.out)
    longest = context_length(order.target)
    context = check_context(order.context, longest)
    questions = given.read_prompts(prompts) if prompts else []
    with ProgressBar() as bar:
        bar.note("loading the target")
        teacher = load_teacher(order.target, device.value)
        tokenizer, target = teacher.tokenizer, fingerprint(order.target)
        corpus = None
        if data is not None or tokenizer.chat_template is None:
            corpus = text.build_corpus(
                read_documents(data),
                tokenizer.backend_tokenizer,
                tokenizer.eos_token_id,
                2 * context,
            )
        digest = corpus.digest if corpus else ""
        with folder.open_work(order.out, order.recipe(target, digest)) as work:
            texts, held_out = own_texts(order, teacher, target, corpus, device, bar)
            requests = {"its own conversations" if corpus is None else "held-out data": held_out}
            if prompts is not None:
                asked = [
                    given.as_tokens(tokenizer, prompt)
                    for prompt in given.spread(questions, HELD_OUT_PROMPTS)
                ]
                requests[prompts.name] = outputs.prompt_requests(
                    asked, "given", longest, order.seed
                )
            answered = {
                title: target_texts(
                    order.target, device, asks, outputs.folder_name(target, asks), bar
                )
                for title, asks in requests.items()
            }
            torch.set_num_threads(threads)  # the runtime has changed it
            if corpus is not None and data is not None:
                texts += data_texts(corpus, context)
            yield EagleData(teacher, texts, answered, digest), work, bar


def own_texts(
    order: "TrainingJob",
    teacher: "Teacher",
    target: str,
    corpus: "Corpus | None",
    device: Device,
    bar: "ProgressBar",
) -> "tuple[list[Tokens], list[Request]]":
    """Returns the target's own texts to learn from, and requests for held-out ones."""
    from training import outputs

    if teacher.tokenizer.chat_template is None and corpus is not None:
        learn = outputs.training_requests(corpus, order.own, order.context, order.seed)
        written = target_texts(order.target, device, learn, outputs.folder_name(target, learn), bar)
        return (
            [(*one.prompt, *one.output) for one in written],
            outputs.held_out_requests(corpus, order.context, order.seed),
        )
    written_by_itself, prompts = conversations(order, teacher, target, bar)
    return (
        [one.tokens for one in written_by_itself],
        outputs.prompt_requests(prompts, "held-out", teacher.model.context, order.seed),
    )


def conversations(
    order: "TrainingJob", teacher: "Teacher", target: str, bar: "ProgressBar"
) -> "tuple[list[OwnText], list[Tokens]]":
    """Returns conversations that the target writes itself, from the cache as far as they are in it,
    and prompts of others to hold out."""
    from training.conversations import folder_name, own_conversations
    from training.outputs import HELD_OUT_COUNT

    where = cache_folder() / "outputs" / folder_name(target, order.context, order.seed)
    tell = bar.counts("writing conversations with the target", order.own)
    made = own_conversations(teacher, where, order.own, order.context, order.seed, tell)
    known = {one.prompt for one in made[HELD_OUT_COUNT:]}
    held_out = [one.prompt for one in made[:HELD_OUT_COUNT] if one.prompt not in known]
    return made[HELD_OUT_COUNT:], held_out


def read_documents(data: list[Path] | None) -> "list[Document]":
    from training import text

    if data is not None:
        return text.read_documents(data)
    from training import stdlib_corpus

    names = sorted(
        [*stdlib_corpus.library_files(held_out=False), *stdlib_corpus.library_files(held_out=True)]
    )
    return [text.Document(name, stdlib_corpus.read_source(name)) for name in names]


def target_texts(
    target: str, device: Device, requests: "Sequence[Request]", name: str, bar: "ProgressBar"
) -> "list[TargetText]":
    """Returns the target's answers to `requests`, from the cache as far as they are in it."""
    from training import outputs

    folder = cache_folder() / "outputs" / name
    if left := outputs.count_missing(folder, requests):
        plan = build_deployment(target, (), 0, "auto", device.value, local=True)
        tell = bar.counts("generating training texts with the target", left)

        async def ask() -> None:
            with serving(plan, None, in_process=True, note=lambda what: None) as opener:
                async with opener() as service:
                    await outputs.write_answers(service.generate, requests, folder, tell)

        asyncio.run(ask())
    return outputs.read_answers(folder, requests)


def print_report(
    order: "TrainingJob", measured: "list[HeldOutAcceptance]", title: str = ""
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(title or f"{order.out} is ready: see its model card", soft_wrap=True)
    for at in measured:
        rates = "  ".join(f"{rates[1]:.2f}" for rates in at.rates)
        console.print(
            f"temperature {at.temperature:g}: acceptance at each place ahead {rates}; "
            f"{at.chain:.2f} tokens per step with one guess for each"
        )
