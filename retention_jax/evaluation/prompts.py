"""Examples of a task as tokens: the context, which may be evicted from before the question is known, and the turns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from retention_jax.tasks.example import Cut, Example, Task
from retention_jax.tasks.text_metrics import truncated_middle
from retention_jax.text import chat
from retention_jax.text.tokenizer import Tokenizer

_PLACEHOLDER = "\ue000user\ue001"  # private-use characters: in no question and in no template


class Prompt(NamedTuple):
    """One example. Tokens of context and first question together are those of the whole prompt."""

    index: int  # in the task
    first_turn: int  # number of its first question among those of all examples
    context: list[int]  # [] where the question is read together with it
    turns: list[list[int]]  # of each turn: its question, what opens the answer, and the answer's given beginning
    closing: bool  # whether each later turn begins with the tokens that end the answer before it
    told: tuple[bool, ...]  # of each turn: whether the next turn begins with a given text in place of this one's answer
    cut: bool  # whether the prompt was too long and lost some text, as the task's authors do it


def num_tokens(prompt: Prompt) -> int:
    """Tokens of context and turns, without answers."""
    return len(prompt.context) + sum(map(len, prompt.turns))


def of_task(
    task: Task,
    tokenizer: Tokenizer,
    *,
    limit: int | None,
    query_aware: bool,
    template_kwargs: dict[str, Any],
    room: Sequence[int],
) -> list[Prompt]:
    """The prompts of a task's first `limit` examples.

    Args:
      task: the benchmark.
      tokenizer: the model's. Its chat template is used where the task is for one and there is one.
      limit: None for all.
      query_aware: whether the context is read together with the first question.
      template_kwargs: further variables of the template.
      room: tokens that each prompt may have, all turns together; longer ones are cut where the task says how.

    Raises:
      ValueError: as `chat.render` does, when the template changes what the user says, and when a prompt has no room
        for what must stay of it.
    """
    templated = task.chat and "default" in tokenizer.chat_templates
    prompts, first_turn = [], 0
    around = _around(tokenizer, template_kwargs) if templated else ("", "")
    first = lambda example: _first(example, tokenizer, templated, around, template_kwargs)
    for index, example in enumerate(task.examples[:limit]):
        later = [_later(example, turn, tokenizer, templated, template_kwargs) for turn in range(1, len(example.turns))]
        tokens, split = first(example)
        left = room[index] - sum(len(turn) for turn, _ in later)
        cut = task.cut if len(tokens) > left else None
        if cut is not None:
            tokens, split = _shortened(example, tokens, split, cut, left, tokenizer, first)
        split = 0 if query_aware else split
        prompts.append(
            Prompt(
                index=index,
                first_turn=first_turn,
                context=tokens[:split],
                turns=[tokens[split:], *(turn for turn, _ in later)],
                closing=any(closing for _, closing in later),
                told=(*(turn.told is not None for turn in example.turns[:-1]), False),
                cut=cut is not None,
            )
        )
        first_turn += len(example.turns)
    return prompts


def _shortened(
    example: Example,
    tokens: list[int],
    split: int,
    cut: Cut,
    most: int,
    tokenizer: Tokenizer,
    first: Callable[[Example], tuple[list[int], int]],
) -> tuple[list[int], int]:
    """What `first` makes of an example (`tokens`, `split`) without so much of its text that at most `most` are left."""
    (turn, *later), context = example.turns, example.context
    text = context + turn.question if cut == "middle of prompt" else context
    offsets = tokenizer.encoding(text).offsets
    keep = len(offsets)
    while len(tokens) > most:  # texts that were apart may become more tokens together
        keep -= len(tokens) - most
        if keep < 2:
            raise ValueError(f"{example.name!r}: no room for a prompt of {most} tokens, even without its {cut}")
        kept = list(range(keep)) if cut == "end of context" else truncated_middle(range(len(offsets)), keep)
        # Cut as text, so that nothing else of it changes: [start, stop) is taken out.
        before = keep if cut == "end of context" else keep // 2
        start = offsets[kept[before - 1]][1]
        stop = len(text) if cut == "end of context" else offsets[kept[before]][0]
        at = lambda place: max(place - len(context), 0)
        question = turn.question[: at(start)] + turn.question[at(stop) :]
        asked = turn._replace(question=question)
        tokens, split = first(example._replace(context=context[:start] + context[stop:], turns=(asked, *later)))
    return tokens, split


def _around(tokenizer: Tokenizer, template_kwargs: dict[str, Any]) -> tuple[str, str]:
    """What the template writes before and behind what the user says."""
    messages = [{"role": "user", "content": _PLACEHOLDER}]
    text = chat.render(tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
    before, found, after = text.partition(_PLACEHOLDER)
    if not found or _PLACEHOLDER in after:
        raise ValueError(f"{tokenizer.where}: the chat template does not write what the user says once")
    return before, after


def _first(
    example: Example,
    tokenizer: Tokenizer,
    templated: bool,
    around: tuple[str, str],
    template_kwargs: dict[str, Any],
) -> tuple[list[int], int]:
    """Tokens of context, first question and the answer's beginning, and how many of them are the context's alone."""
    turn, said = example.turns[0], example.context + example.turns[0].question
    text, end = said, len(example.context)
    if templated:
        messages = [{"role": "user", "content": said}]
        text = chat.render(tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
        before, after = around
        written = text[len(before) : len(text) - len(after)]
        # Some templates trim what the user says.
        if not (text.startswith(before) and text.endswith(after) and written in (said, said.strip())):
            raise ValueError(f"{tokenizer.where}: the chat template changes what the user says in {example.name!r}")
        trimmed = len(said) - len(said.lstrip()) if written != said else 0
        end = len(before) + max(end - trimmed, 0) if example.context else 0
    text += turn.answer_prefix
    ids = tokenizer.encode(text, bos=not templated)
    encoded = tokenizer.encoding(text)
    # A token with characters of both goes to the question, so that the tokens stay those of the whole text.
    split = next((i for i, (_, stop) in enumerate(encoded.offsets) if stop > end), len(encoded.offsets))
    # The question keeps one token at least: an answer goes on from it.
    return ids, min(split + len(ids) - len(encoded.ids), len(ids) - 1) if split else 0


def _later(
    example: Example, turn: int, tokenizer: Tokenizer, templated: bool, template_kwargs: dict[str, Any]
) -> tuple[list[int], bool]:
    """Tokens from the end of the answer before a turn to where its own answer begins, and whether they end that one.

    What is told in place of that answer comes first.
    """
    asked, told = example.turns[turn], example.turns[turn - 1].told
    if not templated:
        told = "" if told is None else f"{told}\n\n"
        return tokenizer.encode_more(told + asked.question + asked.answer_prefix), False
    # What was said before does not matter to what comes after an answer.
    messages = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": "-"},
        {"role": "user", "content": asked.question},
    ]
    closing, after = chat.continuation(tokenizer, messages, 1, template_kwargs=template_kwargs)
    return tokenizer.encode_more((told or "") + closing + after + asked.answer_prefix), bool(closing)


def batches(prompts: Sequence[Prompt], max_new_tokens: Sequence[tuple[int, ...]], size: int) -> list[list[Prompt]]:
    """Batches of prompts that take the same turns and are of similar length, the longest first.

    A last batch that is not full repeats its last prompt, so that it needs no program of its own.
    """
    kinds: dict[tuple[bool, tuple[bool, ...], tuple[int, ...]], list[Prompt]] = {}
    for prompt in prompts:
        kind = bool(prompt.context), prompt.told, max_new_tokens[prompt.index]
        kinds.setdefault(kind, []).append(prompt)
    found = []
    for alike in kinds.values():
        alike.sort(key=lambda p: (-len(p.context), -len(p.turns[0]), p.index))
        width = min(size, len(alike))
        cut = [alike[start : start + width] for start in range(0, len(alike), width)]
        found += [batch + batch[-1:] * (width - len(batch)) for batch in cut]
    return found
