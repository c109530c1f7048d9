"""Chats in the words of a tokenizer's own template.

Each answer is what the template writes for `messages[: i + 1]` after what it writes for `messages[:i]` and the
beginning of an answer. The second is the prompt at test time, so the model meets in training exactly the tokens that it
will be asked with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.errors import DataError, ModelError
from common.records import ASSISTANT, SYSTEM, USER, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Llama's own templates fall back on. With today's date a run could not be repeated tomorrow.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Turn:
    """One answer. prompt: all tokens before it. answer: its own, up to and including what ends it. text: in plain."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


def turns_of(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str = "a chat"
) -> tuple[tuple[Turn, ...], bool]:
    """Every answer of a chat, in order, and whether the template knows no system message.

    In that case the system's text stands before the first user's, as Gemma's makers advise.

    The name of a special token inside a message is text like any other and never becomes that token.

    Raises DataError, which begins with `where`, when the template cannot write the chat, and ModelError without a
    template.
    """
    template = _Template(tokenizer, messages)
    shown = [Message(message.role, template.hide(message.content)) for message in messages]
    moved = False
    if shown[0].role == SYSTEM and not template.keeps_system(shown):
        shown, moved = _without_system(shown, where), True
    found = []
    for place, message in enumerate(shown):
        if message.role != ASSISTANT:
            continue
        number = place + 1 + moved
        try:
            prompt = template.write(shown[:place], True)
            whole = template.write(shown[: place + 1], False)
        except Exception as error:  # a template may raise whatever it likes
            raise DataError(
                f"{where}: the tokenizer's chat template cannot write message {number}, which has the role "
                f"{message.role} after {_roles(shown[:place])}: {error}"
            ) from error
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: expected the tokenizer's chat template to begin message {number} as it begins an answer "
                f"that is still to come ({prompt[-20:]!r}), found {whole[max(len(prompt) - 20, 0) : len(prompt)]!r}; "
                "so what to supervise is unclear. Use another template, or prompt and completion"
            )
        found.append(template.turn(prompt, whole))
    return tuple(found), moved


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that stand for no text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*map(int, tokenizer.all_special_ids), *added})


def own_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's own tokens. "</s>" in a record is four characters like others and ends nothing."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokens


def _without_system(messages: Sequence[Message], where: str) -> list[Message]:
    system, *rest = messages
    first = next((place for place, message in enumerate(rest) if message.role == USER), None)
    if first is None:
        raise DataError(
            f"{where}: the tokenizer's chat template knows no system message, and there is no message of the user that "
            "it could stand before"
        )
    rest[first] = replace(rest[first], content=f"{system.content}\n\n{rest[first].content}")
    return rest


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages[-3:]) or "nothing"


class _Template:
    """A tokenizer's template, for one chat.

    While the template is at work, each special token's name inside a message is one character of the private use area
    that the chat does not have; afterwards that is tokenised as text, and everything around it as the template's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        try:
            self._source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                "the tokenizer has no chat template, and there are chats among the records; expected `chat_template` "
                "in tokenizer_config.json or a file chat_template.jinja beside it, the same at every institution, or "
                "records with prompt and completion"
            ) from error
        names = {str(tokenizer.convert_ids_to_tokens(number)) for number in self._special}
        names |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        said = "".join(message.content for message in messages)
        found = sorted(set(self._names.findall(said)))
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said + self._source)
        self._hidden = dict(zip(found, free, strict=False))
        self._shown = {character: name for name, character in self._hidden.items()}
        self._cut = re.compile(f"([{''.join(self._shown)}])") if self._shown else None

    def hide(self, content: str) -> str:
        return self._names.sub(lambda match: self._hidden[match[0]], content)

    def keeps_system(self, messages: Sequence[Message]) -> bool:
        """Whether the template takes the system's message, and writes it."""
        last = max(place for place, message in enumerate(messages) if message.role == ASSISTANT)
        try:
            return messages[0].content.strip() in self.write(messages[: last + 1], False)
        except Exception:  # a template may raise whatever it likes; without the system's message it is asked again
            return False

    def write(self, messages: Sequence[Message], answer_follows: bool) -> str:
        said = [{"role": message.role, "content": message.content} for message in messages]
        text = self._tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=answer_follows, date_string=_DATE
        )
        return str(text)

    def turn(self, prompt: str, whole: str) -> Turn:
        asked, both = self._tokens(prompt), self._tokens(whole)
        if both[: len(asked)] == asked:
            answer = both[len(asked) :]
        else:
            # The end of the prompt and the beginning of this answer would be one token. The prompt cannot know that.
            answer = self._tokens(whole[len(prompt) :], inside=True)
        answer = self._ended(answer)
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        return Turn(tuple(asked), tuple(answer), str(text))

    def _ended(self, answer: list[int]) -> list[int]:
        """Up to the special token that ends the answer; with the end-of-text token where the template writes none."""
        last = next((place for place in reversed(range(len(answer))) if self._says_something(answer[place])), -1)
        end = next((place for place in range(last + 1, len(answer)) if answer[place] in self._special), None)
        return [*answer, int(self._tokenizer.eos_token_id)] if end is None else answer[: end + 1]

    def _says_something(self, token: int) -> bool:
        return token not in self._special and bool(str(self._tokenizer.decode([token])).strip())

    def _tokens(self, text: str, inside: bool = False) -> list[int]:
        """inside: whether other text stands before."""
        tokens: list[int] = []
        for part in filter(None, self._cut.split(text) if self._cut else [text]):
            name = self._shown.get(part)
            tokens += self._encode(name or part, name is not None, inside or bool(tokens))
        return tokens

    def _encode(self, text: str, as_text: bool, inside: bool) -> list[int]:
        def encode(text: str) -> list[int]:
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)
            return list(encoded["input_ids"])

        if inside:  # some tokenizers would put a space before the first word
            newline, both = encode("\n"), encode("\n" + text)
            if both[: len(newline)] == newline:
                return both[len(newline) :]
        return encode(text)
