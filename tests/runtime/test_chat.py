"""Chat templates: rendering as transformers does it, where they are found, and what they may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.chat import ChatTemplate, load_chat_template

MESSAGES = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Hé?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_STYLE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {%- if loop.index0 > 4 %}{% break %}{% endif %}
    {{- '[' + message['role'] + '] ' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}
{%- generation %}{{ messages | tojson }}{% endgeneration %}
"""


def test_rendering() -> None:
    expected = "<s>[system] Be <brief>.</s>[user] Hé?</s>[assistant] " + json.dumps(MESSAGES, ensure_ascii=False)
    assert ChatTemplate(LLAMA_STYLE, TOKENS).render(MESSAGES).strip() == expected


def test_same_as_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    expected, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=LLAMA_STYLE, add_generation_prompt=True, **TOKENS
    )
    assert ChatTemplate(LLAMA_STYLE, TOKENS).render(MESSAGES) == expected[0]


def test_blocks_leave_no_blank_lines() -> None:
    template = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    assert ChatTemplate(template).render(MESSAGES) == "Be <brief>.\nHé?\n"


def test_date() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES)
    assert int(rendered) >= 2024


def test_the_template_may_refuse() -> None:
    with pytest.raises(SpecQuantError, match="refuses these messages: unknown role tool"):
        ChatTemplate(LLAMA_STYLE, TOKENS).render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_hostile_or_wrong_template_is_one_error(source: str) -> None:
    with pytest.raises(SpecQuantError, match=r"chat template (refuses|fails on) these messages"):
        ChatTemplate(source).render(MESSAGES)


def test_a_broken_template() -> None:
    with pytest.raises(SpecQuantError, match="cannot be read"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"role": "user"}], [{"content": "x"}]])
def test_messages_of_another_form(messages: list) -> None:
    with pytest.raises(SpecQuantError, match="message"):
        ChatTemplate(LLAMA_STYLE, TOKENS).render(messages)


def test_where_it_is_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert load_chat_template(tmp_path) is None
    config.write_text(json.dumps({"bos_token": "<s>"}))
    assert load_chat_template(tmp_path) is None
    for found in ("{{ bos_token }}one", [{"name": "tools", "template": "no"}, {"name": "default", "template": "one"}]):
        config.write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": found}))
        template = load_chat_template(tmp_path)
        assert template is not None
        assert template.render(MESSAGES).endswith("one")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")  # comes first
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "<s>file"
    config.write_text("{")
    with pytest.raises(SpecQuantError, match=r"tokenizer_config\.json cannot be read"):
        load_chat_template(tmp_path)
