"""The chat template of a model: messages into the one prompt string it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specquant.custom_ops.errors import SpecQuantError

Message = Mapping[str, Any]
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ChatTemplate:
    """A Jinja template as Hugging Face tokenizers carry it.

    Rendered in a sandbox that cannot change or reach anything outside: a template is a program from a stranger.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises SpecQuantError when `source` is not a template."""
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise SpecQuantError(f"the chat template cannot be read ({_line(error)}): re-export the model") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt, special tokens written out: encode it without adding any.

        messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first. Raises SpecQuantError
        for messages of another form and for those that the template refuses.
        """
        check_messages(messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise SpecQuantError(f"the chat template refuses these messages: {_line(error)}") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise SpecQuantError(f"the chat template fails on these messages: {_line(error)}") from None


def load_chat_template(folder: str | Path) -> ChatTemplate | None:
    """The template of the tokenizer in `folder`: chat_template.jinja, else tokenizer_config.json; None without one."""
    folder = Path(folder)
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecQuantError(f"{path} cannot be read ({_line(error)}): re-export the model") from None
    own_file = folder / "chat_template.jinja"
    source = own_file.read_text(encoding="utf-8") if own_file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name; the chat is called "default"
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, _special_tokens(config))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise SpecQuantError unless these are messages: dictionaries with a role and a content, at least one."""
    if isinstance(messages, str) or not messages:
        raise SpecQuantError('a chat needs messages: [{"role": "user", "content": "…"}]')
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise SpecQuantError(f'{message!r:.80} is not a message: it needs "role" and "content"')


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _environment() -> jinja2.Environment:
    # The settings and helpers that templates are written against (transformers' apply_chat_template).
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
