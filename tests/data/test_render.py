"""Templates: found, broken, hostile; rendered as transformers does; the assistant's characters found or refused."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from dstune.data import jinja_sandbox
from dstune.data.annotate import Marks, core
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.jinja_sandbox import ChatTemplate, TemplateLimit
from dstune.data.render import Renderer
from dstune.data.templates import Template, builtin_template, resolve_template
from dstune.errors import ConfigError
from tests.data.made_tokenizers import CHATML, byte_level

NOW = datetime(2024, 7, 26)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "n": 2}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}

QWEN_STYLE = """{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.found = true %}{% set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = message.content %}{% set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FRAMED = {
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "end of text at the end": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|end|>{% endif %}",
    "thoughts in the prompt": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "another end of the last turn": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|end|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no control tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "no prompt": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "qwen": QWEN_STYLE,
}
UNMARKABLE = {
    "json": "{{ messages | tojson }}",
    "backwards": "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}x{% endif %}",
    "header only after": "{% for m in messages %}{{ m.content }} -- {{ m.role }}\n{% endfor %}{{ messages | length }}",
    "never reached": "{% for m in messages %}{% if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "wrong words": "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loses the answer": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "header without a prompt": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "shouts": "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
}


def talk(*said: str) -> Conversation:
    """user, assistant, user, …"""
    return Conversation(tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said)))


def renderer(source: str, control: tuple[str, ...] = (*CHATML, "<|end|>")) -> Renderer:
    pattern = re.compile("|".join(map(re.escape, control)))
    return Renderer(Template("t", source), {"eos_token": "<|end|>"}, pattern, NOW)


def spoken(made: Renderer, conversation: Conversation) -> list[str]:
    rendered = made.render(conversation)
    return [rendered.text[span.start : span.end] for span in made.spans(conversation, rendered)]


@pytest.mark.parametrize("name", ["chatml", "qwen2", "qwen2.5", "qwen3", "alpaca", "plain"])
def test_built_in_templates_render_as_transformers_does_and_mark_all_of_the_answers(name: str):
    tokenizer = byte_level(special=(*CHATML, "<|end|>"), eos_token="<|end|>")
    template = builtin_template(name, tokenizer)
    conversation = Conversation(
        (
            Message("system", "s"),
            Message("user", "u"),
            Message("assistant", "", tool_calls=(CALL, CALL)),
            Message("tool", "t"),
            Message("tool", "t2"),
            Message("assistant", "a", tool_calls=(CALL,), reasoning="hm"),
            Message("user", "v"),
            Message("assistant", " b "),
        ),
        (TOOL,),
    )
    made = renderer(template.source)
    rendered = made.render(conversation)
    theirs = tokenizer.apply_chat_template(
        conversation.to_dicts(), tools=[TOOL], chat_template=template.source, tokenize=False
    )
    assert rendered.text == theirs
    end = "<|end|>" if name in ("alpaca", "plain") else "<|im_end|>"
    lead = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    spans = spoken(made, conversation)
    assert len(spans) == 3 and spans[2] == f"{lead} b {end}"
    if name != "plain":
        assert all(span.endswith(end) for span in spans)
        assert (
            spans[0].count("Paris") == 2
            and ("hm" in spans[1]) == (name != "qwen3")
            and not re.search(r"assistant|Response", "".join(spans))
        )
        prompt = made.render(Conversation(conversation.messages[:-1], conversation.tools), prompt=True).text
        assert rendered.text.startswith(f"{prompt}{lead} b ")


@pytest.mark.parametrize("name", FRAMED)
def test_templates_without_marks_are_compared(name: str):
    made = renderer(FRAMED[name])
    made.check()
    ends = {
        "end of text at the end": ("<|im_end|>", "<|im_end|><|end|>"),
        "another end of the last turn": ("<|im_end|>", "<|end|>"),
    }
    first, last = ends.get(name, ("\n", "\n") if name.startswith("no ") else ("<|im_end|>", "<|im_end|>"))
    lead = "<think>\n\n</think>\n\n" if name == "qwen" else ""
    assert spoken(made, talk("q", "a", "q", "a")) == [f"a{first}", f"{lead}a{last}"]
    if name != "trims":
        assert spoken(made, talk("a", " a\n\n", "  ", "\ta ")) == [f" a\n\n{first}", f"{lead}\ta {last}"]
    else:
        assert spoken(made, talk("a", " a\n\n", "  ", "\ta ")) == [f"a{first}", f"a{last}"]


def test_thoughts_of_earlier_turns_may_be_left_out_those_of_the_last_not():
    made = renderer(QWEN_STYLE)
    thought = talk("q", "<think>\nhm\n</think>\n\none", "r", "<think>\nha\n</think>\n\ntwo")
    assert spoken(made, thought) == ["one<|im_end|>", "<think>\nha\n</think>\n\ntwo<|im_end|>"]
    forgets = renderer(FRAMED["trims"].replace("m.content | trim", "m.content.split('</think>')[-1] | trim"))
    with pytest.raises(Refused, match="template_drops_content"):
        forgets.render(thought)


def test_tool_calls_between_turns_are_marked():
    made = renderer(QWEN_STYLE)
    conversation = Conversation(
        (
            Message("user", "q"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "<|im_end|>3"),
            Message("assistant", "It is 3."),
            Message("user", "r"),
            Message("assistant", "Done."),
        )
    )
    first, second, third = spoken(made, conversation)
    assert re.fullmatch(r"<tool_call>\{.*Paris.*\}</tool_call><\|im_end\|>", first)
    assert (second, third) == ("It is 3.<|im_end|>", "<think>\n\n</think>\n\nDone.<|im_end|>")


def test_a_call_is_marked_to_its_end_where_no_token_ends_it():
    """GLM writes arguments one by one and nothing behind the last one."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
        "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}</call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    conversation = Conversation(
        (Message("user", "q"), Message("assistant", "", tool_calls=(CALL,)), Message("tool", "3"))
    )
    assert spoken(renderer(source), conversation) == ["<call>get_weathercity=Paris;n=2;</call>"]


def test_without_headers_all_of_a_call_is_the_assistant_s():
    """Mistral has no generation prompt: what follows the question is the answer, or the call and its brackets. It counts ids' letters."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content }}[/Q]{% elif m.tool_calls %}[CALLS]"
        "{{ m.tool_calls[0].function | tojson }}{% if m.tool_calls[0].id | length != 9 %}{{ raise_exception('id') }}{% endif %}<|end|>"
        "{% elif m.role == 'assistant' %} {{ m.content }}<|end|>{% else %}[R]{{ m.content }}[/R]{% endif %}{% endfor %}"
    )
    called = Message("assistant", "", tool_calls=({**CALL, "id": "abcdefgh1"},))
    conversation = Conversation((Message("user", "q"), called, Message("tool", "3"), Message("assistant", "a")))
    first, second = spoken(renderer(source, ("[Q]", "[/Q]", "[CALLS]", "[R]", "[/R]", "<|end|>")), conversation)
    assert first.startswith("[CALLS]{") and first.endswith("}<|end|>") and second == " a<|end|>"


@pytest.mark.parametrize("name", UNMARKABLE)
def test_a_template_that_cannot_mark_is_an_error_that_names_it(name: str):
    with pytest.raises(ConfigError, match=r"data\.template \(t\)"):
        renderer(UNMARKABLE[name]).check()


def test_blocks_in_pieces_and_an_end_by_itself():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    conversation = talk("a", "a", "a", "b")
    made = renderer(source)
    found = made.spans(conversation, made.render(conversation))
    assert [span.message for span in found] == [1, 1, 3, 3]


def test_a_template_that_drops_something_is_refused():
    keeps = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    made = renderer(keeps)
    with pytest.raises(Refused, match=r"template_drops_content.*message 1"):
        made.render(Conversation((Message("user", "q"), Message("assistant", "", tool_calls=(CALL,)))))
    with pytest.raises(Refused, match="tools"):
        made.render(Conversation((Message("user", "q"), Message("assistant", "a")), (TOOL,)))
    unsaid = renderer(keeps.replace("{% for m in messages %}", "SYSTEM f{% for m in messages if m.role != 'system' %}"))
    with pytest.raises(Refused, match=r"template_drops_content.*message 0 \(system\)"):
        unsaid.render(Conversation((Message("system", "S"), Message("user", "q"), Message("assistant", "a"))))
    with pytest.raises(Refused, match="tools"):
        unsaid.render(Conversation(talk("q", "a").messages, ({"type": "function", "function": {"name": "f"}},)))
    escaped = renderer("{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    escaped.render(talk('he said "x"\n', "a"))


def test_a_template_that_refuses_or_fails_refuses_the_conversation():
    with pytest.raises(Refused, match=r"template_refused.*roles must alternate"):
        renderer("{{ raise_exception('roles must alternate') }}").render(talk("q"))
    with pytest.raises(Refused, match=r"template_failed.*TypeError"):
        renderer("{{ messages + 'x' }}").render(talk("q"))
    with pytest.raises(Refused, match="template_refused"):
        renderer("{{ messages[0].nothing.more }}").render(talk("q"))


def test_auto_finds_what_the_tokenizer_was_made_for():
    def found(tokenizer, **settings):
        return resolve_template("auto", tokenizer, Path("/"), **settings)

    assert found(byte_level()).name == "chatml"
    llama = byte_level(special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    assert found(llama).name == "llama3" and "END = '<|eot_id|>'" in found(llama).source
    assert found(byte_level(special=("<e>",), eos_token="<e>"), seq2seq=True).name == "plain"
    own = byte_level()
    own.chat_template = "{{ messages }}"
    assert (found(own).name, found(own).source) == ("tokenizer", "{{ messages }}")
    own.chat_template = {"default": "d", "tool_use": "t"}
    assert found(own).for_tools(False) == "d" and found(own).for_tools(True) == "t"
    own.chat_template = {"rag": "r"}
    with pytest.raises(ConfigError, match="rag"):
        found(own)
    with pytest.raises(ConfigError, match=r"chatml, llama2.*alpaca"):
        found(byte_level(special=("<e>",)))


def test_files_are_read_and_their_faults_named(tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert resolve_template("own.jinja", byte_level(), tmp_path).name == "own.jinja"
    (tmp_path / "broken.jinja").write_text("a\n{% for m in %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.jinja:2"):
        resolve_template("broken.jinja", byte_level(), tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        resolve_template("chatmll", byte_level(), tmp_path)


def test_the_end_of_a_turn_is_a_token_that_the_tokenizer_has():
    assert "END = '<|im_end|>'" in builtin_template("chatml", byte_level(eos_token="<|im_start|>")).source
    assert "END = eos_token" in builtin_template("chatml", byte_level(special=("<e>",), eos_token="<e>")).source
    assert "END = '<|im_end|>'" in builtin_template("alpaca", byte_level()).source
    assert "END = '<|im_end|>'" in builtin_template("chatml", byte_level(special=())).source
    with pytest.raises(ConfigError, match="eos_token"):
        builtin_template("alpaca", byte_level(special=()))


def test_strftime_now_is_fixed_by_the_caller():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", NOW).render([], None, {}).text == "26 Jul 2024"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 1000000000 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 2 ** 1000000 }}",
        "{% set ns = namespace(t='xxxxxxxxxx') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
    ],
)
def test_bombs_are_stopped(source: str):
    with pytest.raises((TemplateLimit, OverflowError)):
        ChatTemplate(source, NOW).render([], None, {})


def test_a_loop_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_SECONDS", 0.2)
    source = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateLimit, match="seconds"):
        ChatTemplate(source, NOW).render([], None, {})


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}"],
)
def test_the_sandbox_holds(source: str):
    with pytest.raises(Refused):
        renderer(source).render(talk("q", "a"))


@pytest.mark.parametrize("said", ["null", "string", "function"])
def test_words_of_schemas_are_marked_where_somebody_says_them(said: str):
    made = renderer(FRAMED["trims"])
    text = made.render(talk(said, said)).text
    ranges = made.annotate(talk(said, said), text)
    assert ranges is not None and [found.message for found in ranges] == [0, 1]


def test_marks_survive_content_that_uses_private_characters_itself():
    evil = "\U00100000x\U00100001 \U0010fffd"
    conversation = talk(f" {evil} ", evil)
    made = renderer(FRAMED["trims"])
    text = made.render(conversation).text
    ranges = made.annotate(conversation, text)
    assert ranges is not None and [text[found.start : found.end] for found in ranges] == [evil, evil]
    with pytest.raises(ValueError, match="private"):
        Marks(talk("\U00100000 \U000f0000", "a"), core)
    assert made.annotate(talk("\U00100000 \U000f0000", "a"), "x") is None
