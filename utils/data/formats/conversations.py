"""Makes a conversation of a row of the user's own data, whatever its columns are."""

from typing import Any, NamedTuple

from utils.data.reading.messages import MARKS, Malformed, Message, is_message, parsed, to_messages, to_tools
from utils.data.reading.whole_values import unmarked, without_nulls

Sample = dict[str, Any]

PROMPT_ROLES = ("prompt", "instruction", "question", "query")
ANSWER_ROLES = ("chosen", "response", "completion", "output", "answer", "answers", "human_answers")
TALK_ROLES = ("messages", "conversations")
INPUT_ROLES = ("input", "context")
OF_TOKENS = ("labels", "loss_mask", "attention_mask")  # columns with a value for each of the row's input_ids
REASONING = ("reasoning_content", "reasoning", "thinking")
ANSWER_FIELDS = ("text", "value")  # of an object that is an answer
_SHOWN_FIELDS = " or ".join(f'"{name}"' for name in ANSWER_FIELDS)
_EXCERPT = 120


class Conversation(NamedTuple):
    """The messages up to and including the last answer, and the functions that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Rows(NamedTuple):
    """How the rows of a data set are read."""

    roles: dict[str, str]  # column by role
    whole: frozenset[str] = frozenset()  # columns that may hold messages or other values, as JSON text

    def value(self, sample: Sample, role: str) -> Any:
        """Return what the row's column of this role holds; None where it has none."""
        column = self.roles.get(role)
        found = None if column is None else unmarked(sample.get(column))
        is_value = column in self.whole and isinstance(found, str) and found.lstrip()[:1] in ("[", "{")
        return parsed(found) if is_value else found

    def role_of(self, candidates: tuple[str, ...]) -> str | None:
        """Return the first of these roles that has a column."""
        return next((role for role in candidates if role in self.roles), None)

    def prompt_text(self, sample: Sample) -> str | None:
        """Return the prompt of a row without messages: the task, and below it the task's input."""
        text = self.value(sample, self.role_of(PROMPT_ROLES) or "")
        for role in INPUT_ROLES:
            extra = self.value(sample, role)
            if isinstance(text, (list, dict)) or is_blank(extra):
                continue
            text = extra if is_blank(text) else f"{text}\n{extra}"
        return text

    def answer(self, sample: Sample, rejected: bool = False) -> Any:
        """Return the answer of a row without messages, the first of several; it may be a list of messages."""
        return _answers_in(self.value(sample, "rejected" if rejected else self.role_of(ANSWER_ROLES) or ""))[0]

    def beside_answer(self, sample: Sample) -> tuple[bool, list[str]]:
        """Return whether the row has other answers than its first, and the fields of the answer that are not read."""
        role = self.role_of(ANSWER_ROLES) or ""
        answers, fields = _answers_in(self.value(sample, role))[1:]
        return any(answer != answers[0] for answer in answers), [f"{name} of {self.roles[role]}" for name in fields]

    def is_talk(self, sample: Sample, whole: bool = False) -> bool:
        """Whether the answer is no text; `whole`: whether it is a conversation, with the prompt in it."""
        answer = self.answer(sample)
        if not whole:
            return isinstance(answer, (list, dict))
        return isinstance(answer, list) and to_messages(answer[:1], "answer")[0]["role"] not in ("assistant", "tool")

    def leaves_prompt(self, sample: Sample) -> bool:
        """Whether the row's answer is a whole conversation, which does not hold the prompt or history beside it.

        Raises:
            Malformed: a column holds something else.
        """
        answer = self.answer(sample)
        if not isinstance(answer, list) or self.role_of(TALK_ROLES) is not None or not self.is_talk(sample, whole=True):
            return False
        if self._history(sample):
            return True
        prompt = self.prompt_text(sample) if self.role_of(PROMPT_ROLES) is not None else None
        if _is_nothing(prompt):
            return False
        asked = _as_messages(prompt, "user", self.roles, PROMPT_ROLES)[-1]["content"].strip()
        held = [message["content"].strip() for message in to_messages(answer, "")]
        return not any(text and (text in asked or asked in text) for text in held)

    def read(self, sample: Sample, rejected: bool = False) -> tuple[Conversation | None, int]:
        """Return the row as a conversation, None where there is nothing to learn; and the turns after its last answer.

        Raises:
            Malformed: a column holds something else.
        """
        talk = self.role_of(TALK_ROLES)
        if talk is not None:
            given = [] if rejected else to_messages(self.value(sample, talk), self.roles[talk])
        else:
            given = self._pair(sample, rejected)
        messages = _until_last_answer(given)
        if not messages:
            return None, len(given)
        tools = to_tools(self.value(sample, "tools"), self.roles["tools"]) if "tools" in self.roles else None
        return Conversation(self._with_system(sample, messages), tools), len(given) - len(messages)

    def _pair(self, sample: Sample, rejected: bool) -> list[Message]:
        """Return prompt and answer as messages, each a text or a list of messages itself; [] where one is blank."""
        prompt, answer = self.prompt_text(sample), self.answer(sample, rejected)
        if _is_nothing(answer):
            return []
        answers = _as_messages(answer, "assistant", self.roles, ("rejected",) if rejected else ANSWER_ROLES)
        if self.role_of(PROMPT_ROLES) is None:
            if len(answers) == 1:  # a text, which would be an answer to nothing
                column = self.roles["rejected" if rejected else self.role_of(ANSWER_ROLES)]
                raise Malformed(
                    f'"{column}" holds no conversation, and there is no prompt beside it: name the column of the '
                    f"prompt with --columns prompt=..., or read whole texts with --columns text={column}"
                )
            return answers
        if _is_nothing(prompt):
            return []
        asked = _as_messages(prompt, "user", self.roles, PROMPT_ROLES)
        is_whole = isinstance(answer, list) and answers[0]["role"] not in ("assistant", "tool")
        return answers if is_whole else [*self._history(sample), *asked, *answers]

    def _history(self, sample: Sample) -> list[Message]:
        """Return the earlier turns: pairs of question and answer, or messages."""
        value = parsed(self.value(sample, "history"))
        if not value or not isinstance(value, list):
            if value and not (isinstance(value, str) and not value.strip()):
                raise Malformed(f'"{self.roles["history"]}" is no list of earlier turns: pairs of texts are needed')
            return []
        turns: list[Message] = []
        for place, turn in enumerate(value):
            where = f"{self.roles['history']}[{place}]"
            if isinstance(turn, dict):
                turns += to_messages([turn], where)
            elif isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
                turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            else:
                raise Malformed(f'"{where}" is no earlier turn: a pair of texts, question and answer, is needed')
        return turns

    def _with_system(self, sample: Sample, messages: list[Message]) -> list[Message]:
        """Return the messages with the text of the column `system` before them."""
        text = self.value(sample, "system")
        if is_blank(text) or not isinstance(text, str):
            return messages
        if messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}, *messages]
        if messages[0]["content"].strip() == text.strip():
            return messages
        raise Malformed(
            f'"{self.roles["system"]}" and the conversation\'s own system turn hold different texts: remove one of them'
        )


def _as_messages(value: Any, role: str, roles: dict[str, str], candidates: tuple[str, ...]) -> list[Message]:
    where = next((roles[name] for name in candidates if name in roles), "")
    if isinstance(value, list):
        return to_messages(value, where)
    if is_message(value):
        return to_messages([without_nulls(value)], where)
    if isinstance(value, dict):
        raise Malformed(
            f'"{where}" is an object with {", ".join(value) or "nothing"}: an answer is a text, a list of texts, an '
            f"object that has one of these in {_SHOWN_FIELDS}, or a list of messages; give another column with "
            "--columns response=..., or write the answer as a text"
        )
    if not isinstance(value, str):
        raise Malformed(f'"{where}" holds {value!r} where a text or a list of messages is needed')
    return [{"role": role, "content": value}]


def _answers_in(value: Any) -> tuple[Any, list[Any], list[str]]:
    """Return the first answer that a value holds, all that it holds, and the fields of an object that are not read.

    An answer is a text or a list of messages. Several are a list, or (as in SQuAD) in a field of an object.
    """
    fields: list[str] = []
    if isinstance(value, dict) and not is_message(value):
        name = next((name for name in ANSWER_FIELDS if value.get(name) is not None), None)
        if name is None:
            return value, [value], fields
        fields = [other for other in value if other != name and value[other] is not None]
        value = value[name]
    if not isinstance(value, list) or not value or is_message(value[0]):
        return value, [value], fields
    found = [_answers_in(item) for item in value]
    return found[0][0], [first for first, *_ in found], list(dict.fromkeys([*fields, *found[0][2]]))


def _until_last_answer(messages: list[Message]) -> list[Message]:
    """Return the messages up to the last answer that holds anything."""
    end = len(messages)
    while end and not (messages[end - 1]["role"] == "assistant" and has_words(messages[end - 1])):
        end -= 1
    return messages[:end]


def has_words(message: Message) -> bool:
    """Whether a message holds anything: text, reasoning or a call."""
    texts = [message["content"], *(message.get(name) or "" for name in REASONING)]
    return bool(message.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in texts)


def is_trained(message: Message) -> bool:
    """Whether an answer is to be learned: not where one of its marks is 0 or false."""
    return all(message.get(mark, 1) for mark in MARKS)


def is_blank(text: Any) -> bool:
    """Whether a value is no text, or white space alone."""
    return not text or (isinstance(text, str) and text.isspace())


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and is_blank(value))


def excerpt(messages: list[Message]) -> str:
    """Return the beginning of a conversation, for a message."""
    text = " / ".join(f"{message['role']}: {message['content']}" for message in messages)
    return f'the conversation "{text[:_EXCERPT]}{"..." if len(text) > _EXCERPT else ""}"'
