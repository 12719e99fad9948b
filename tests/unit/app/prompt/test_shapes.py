"""Joined prompts are what the templates render, error for error; a second rendering with an unused variable tells."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.prompt.sandbox import Environment, TemplateError, TemplateLimits
from app.prompt.template import ChatTemplate, SpecialToken
from planes.probes import CONVERSATIONS

SPECIALS = [SpecialToken("<|im_start|>"), SpecialToken("<|im_end|>"), SpecialToken("</think>")]
DEMO = Path("workers/demo_model/chat_template.jinja").read_text()
SIM = json.loads(Path("workers/sim/model/tokenizer_config.json").read_text())["chat_template"]


def each(body):
    return "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """\
{%- if tools %}{{- tools | tojson }}{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
        not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n'
                + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<tool_response>\n' + content + '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|im_end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\n\n'+ message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<|im_start|>' + message['role'] + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<|im_end|>\n' }}
{%- endfor -%}
"""
DEEPSEEK = """\
{% set ns = namespace(system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
    {%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}
        {% set ns.is_first_sp = false %}
    {%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {% set content = message['content'] %}
    {%- if message['role'] == 'user' %}{{ '<|User|>' + content }}{%- endif %}
    {%- if message['role'] == 'assistant' and content is not none %}
        {% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{ '<|Assistant|>' + content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
"""
SHAPED = {
    "demo": DEMO,
    "sim": SIM,
    "chatml": CHATML,
    "qwen": QWEN,
    "llama": LLAMA,
    "deepseek": DEEPSEEK,
    "twice and not at all": "{{ messages[0].content }}{{ messages[0].content }}",
    "roles alone": "{% for m in messages %}{{ m.role | upper }},{% endfor %}",
    "a macro": "{% macro f(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "call": "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}{{ messages[0].content }}{% endcall %}",
    "set block": "{% set x %}[{{ messages[0].content }}]{% endset %}{{ x }}{{ x ~ 1 ~ none }}",
    "block": "{% block b %}{{ messages[0].content }}{% endblock %}{{ self.b() }}",
    "trimmed macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) | trim }}",
    "recursion": "{% for m in messages[:1] recursive %}{{ m.content }}{% if loop.depth < 3 %}{{ loop([m]) }}{% endif %}"
    "{% endfor %}",
    "default": each(
        "{{ m.content | default('') }}{{ m.name | default(m.content, true) }}{{ m.content | d('', true) }}"
    ),
    "tests": each(
        "{{ m.content is string }}{{ m.content is none }}{{ m.content is mapping }}{{ m.content is defined }}"
        "{{ m.content is undefined }}{{ m.content is iterable }}{{ m.content is sequence }}{{ m.content is number }}"
        "{{ m.content is boolean }}{{ m.content is true }}{{ m.content is callable }}{{ m.content is integer }}"
    ),
    "emptiness": each("{{ m.content != '' }}{{ m.content == none }}{{ 1 if m.content }}{{ not m.content }}"),
    "choices": each("{{ m.content or 'none' }}{{ m.name or m.content }}{{ m.content and 1 }}"),
    "lists": "{% set all = [] %}{% for m in messages %}{% set all = all + [m.content] %}{% endfor %}{{ all | length }}"
    "{{ (messages | map(attribute='content') | list)[0] }}{{ (messages | selectattr('role', 'equalto', 'user') | list)"
    " | length }}{{ messages | rejectattr('content', 'string') | list | length }}",
    "dicts": "{{ dict(a=messages[0].content).a }}{{ {'a': messages[0].content}['a'] }}"
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }}{% endfor %}{{ messages[0] | list }}",
    "grouped": "{% for g in messages | groupby('role') %}{{ g.grouper }}{% for m in g.list %}{{ m.content }}"
    "{% endfor %}{% endfor %}{% for m in messages | sort(attribute='role') %}{{ m.content }}{% endfor %}",
    "neighbours": each("{{ loop.previtem.content if loop.previtem }}{{ loop.changed(m.role) }}"),
    "itself": each("{{ m.content == m.content }}{{ [m.content] == [m.content] }}{{ m == m }}"),
    "markers": each("{{ '</think>' in m.content }}{{ m.content.startswith('<x') }}{{ m.content.split('>')[-1] }}"),
    "strip": each("{{ m.content.strip() }}{{ m.content }}"),
    "generation": each("{% generation %}{{ m.content }}{% endgeneration %}"),
    "chance, not used": "{{ messages[0].content }}{% if false %}{{ strftime_now('%Y') }}{{ [1] | random }}{% endif %}",
    "products": "{{ '-' * 3 }}{{ ([messages[0].content] * 2) | length }}{{ 7 // 2 - 1 + 2 ** 3 % 5 }}",
    "escaped beside": "{{ {'a': 1} }}{% autoescape true %}{{ messages[0].role }}{% endautoescape %}"
    "{{ messages[0].content }}",
    "nothing": "",
}
SHAPELESS = {
    "a filter block that is no text": "{% filter list %}{{ messages[0].content }}{% endfilter %}",
    "a number in a filter block": "{{ messages[0].content }}{% filter length %}a{% endfilter %}",
    "doubled": "{% set n = namespace(x=messages[0].content) %}{% for i in range(14) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ 1 if n.x }}",
    "length": each("{{ m.content | length }}"),
    "slices": each("{{ m.content[1:] }}{{ m.content[:-1] }}"),
    "an index": each("{{ m.content[0] }}"),
    "in": each("{{ 'a' in m.content }}"),
    "in a list": each("{{ m.content in ['12', 'true'] }}"),
    "in the list": "{{ 'a' in (messages | map(attribute='content') | list) }}",
    "startswith": each("{{ m.content.startswith('1') }}"),
    "format": "{{ messages[0].content.format(1) }}{{ '{}{!r}'.format(messages[0].content, 1) }}",
    "format map": "{{ '{a}'.format_map({'a': messages[0].content}) }}",
    "percent": "{{ '%s' % messages[0].content }}",
    "percent of nothing": "{{ 'abc' % messages[0].content }}",
    "text for percent": "{{ messages[0].content % () }}",
    "percent in a filter": "{{ 'abc' | format(messages[0].content) }}",
    "upper": each("{{ m.content | upper }}"),
    "replace": each("{{ m.content.replace('a', 'b') }}{{ m.content | replace('a', 'b') }}"),
    "trimmed of something": each("{{ m.content.strip('a') }}{{ m.content | trim('a') }}"),
    "one end": each("{{ m.content.lstrip() }}"),
    "trimmed with text": each("{{ (' ' ~ m.content) | trim }}"),
    "is it blank": each("{{ 1 if m.content | trim else 2 }}{{ m.content | trim == '' }}"),
    "filter block": each("{% filter trim %} {{ m.content }} {% endfilter %}"),
    "trimmed set block": each("{% set x | trim %} {{ m.content }}{% endset %}{{ x }}"),
    "trimmed block": "{% block b %} {{ messages[0].content }}{% endblock %}{{ self.b() | trim }}",
    "macro with trim": "{% macro f(x) %} {{ x }} {% endmacro %}{{ f(messages[0].content) | trim }}",
    "int": each("{{ m.content | int }}"),
    "int of a float": each("{{ m.content | float(1) | int }}"),
    "caught": each("{{ m.content | int('x') is string }}"),
    "safe and escape": each("{{ m.content | safe }}{{ m.content | e }}"),
    "autoescape": "{% autoescape true %}{{ messages[0].content }}{{ 'a' ~ messages[0].content }}{% endautoescape %}",
    "autoescaped macro": "{% macro f(x) %}{{ x }}{% endmacro %}{% autoescape true %}{{ f(messages[0].content) }}"
    "{% endautoescape %}",
    "changed": each("{{ loop.changed(m.content) }}"),
    "cycle": each("{{ loop.cycle(m.content, 'x') }}"),
    "equal": "{{ messages[0].content == messages[-1].content ~ '' }}",
    "greater": "{{ 'a' < messages[0].content }}",
    "same as": "{{ messages[0].content is sameas 'a' }}",
    "lower": "{{ messages[0].content is lower }}",
    "tojson": "{{ messages | tojson }}",
    "indented": "{{ messages[0] | tojson(indent=1) }}",
    "join": "{{ messages | map(attribute='content') | join('+') }}",
    "method join": "{{ '+'.join([messages[0].content]) }}",
    "unique": "{{ messages | map(attribute='content') | unique | list | length }}",
    "sort": "{% for x in messages | map(attribute='content') | sort %}{{ x }}{% endfor %}",
    "upper mapped": "{{ messages | map(attribute='content') | map('upper') | list | length }}",
    "tested": "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "grouped by content": "{{ messages | groupby('content') | length }}",
    "max": "{{ messages | map(attribute='content') | max }}",
    "sum": "{{ [] | sum(start=messages[0].content) }}",
    "sum of texts": "{{ ['a'] | sum(start=messages[0].content) }}",
    "sum of contents": "{{ messages | sum(attribute='content') }}",
    "batch": "{{ [1] | batch(2, messages[0].content) | list }}",
    "characters": "{% for c in messages[0].content %}{{ c }}{% endfor %}",
    "unpacked": "{% set a, b = messages[0].content %}{{ a }}",
    "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*messages[0].content) }}",
    "as a key": "{{ {messages[0].content: 1} }}",
    "as a name": "{{ messages[0][messages[0].content] }}",
    "as an index": "{{ messages[messages[0].content] }}",
    "as a slice": "{{ 'abc'[messages[0].content:] }}",
    "repeated": "{{ messages[0].content * 2 }}",
    "a number": "{{ messages[0].content + 1 }}",
    "negative": "{{ -messages[0].content }}",
    "a dict": "{{ dict(messages[0].content) }}{{ namespace(messages[0].content) }}",
    "printed": "{{ [messages[0].content] }}{{ messages[0] }}",
    "pretty": "{{ messages | pprint }}",
    "string": "{{ messages | string | length }}",
    "method": "{{ messages[0].content.startswith is callable }}{{ 1 if messages[0].content.strip }}",
    "method of two": "{{ messages[0].content.startswith('<', 0) }}{{ messages[0].content.strip(none) }}",
    "called": "{{ messages[0].content() }}",
    "attribute": "{{ messages[0].content.text is defined }}{{ messages[0].content['text'] }}",
    "attr": "{{ messages[0].content | attr('upper') }}",
    "urlize": "{{ messages[0].content | urlize }}{{ messages[0].content | wordcount }}",
    "xmlattr": "{{ messages[0] | xmlattr }}",
    "too many defaults": "{{ messages[0].content | default(1, 2, 3) }}",
    "a wrong test": "{{ messages[0].content is string(1) }}",
    "raised": "{{ raise_exception(messages[0].content) }}",
    "the date": each("{{ m.content }}") + "{{ strftime_now('%Y') }}",
    "include": "{{ messages[0].content }}{% include 'x' ignore missing %}",
    "missing": "{{ nothing.at.all }}",
}
BY_ROLES = {"gemma": GEMMA}
EVERY = {**SHAPED, **SHAPELESS, **BY_ROLES}
CLOCK = datetime(2026, 7, 4, tzinfo=UTC)


def template(source, **kwargs):
    return ChatTemplate(source, SPECIALS, variables={"bos_token": "<s>"}, clock=lambda: CLOCK, **kwargs)


TEMPLATES = {name: template(source) for name, source in EVERY.items()}
NAMES = list(EVERY)


def conversation(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def has_shape(compiled, messages):
    return compiled._shapes.prompt(messages, is_reply=True) is not None


def outcome(compiled, messages, kwargs, *, is_reply):
    try:
        return compiled.render(messages, kwargs, is_reply=is_reply)
    except TemplateError as exc:
        return str(exc), exc.param


RENDERED = {"never_mentioned": 0}
"""A request with variables is always rendered."""

CONTENTS = st.one_of(
    st.sampled_from(
        ["", " ", "12", "-0.5", "true", "None", "none", "a", "b", "a\n", "\ta b ", "\xa0", "\U000f0000", "\U0010fffd"]
    ),
    st.sampled_from(["<|im_", "end|>", "a|", "</think", "%s", "{}", "{0.x}", "&", "\ud800", "[A]", "role"]),
    st.text(max_size=6),
)
CONVERSATIONS_OF_ANY_ROLES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "user", "assistant", "assistant", "tool"]),
            "content": CONTENTS,
        },
        optional={"name": st.just("n")},
    ),
    min_size=1,
    max_size=5,
)
ALTERNATING = st.lists(CONTENTS, min_size=1, max_size=5).map(lambda contents: conversation(*contents))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(messages=CONVERSATIONS_OF_ANY_ROLES | ALTERNATING, is_reply=st.booleans())
def test_a_joined_prompt_is_the_rendered_one(name, messages, is_reply):
    compiled = TEMPLATES[name]
    for _ in range(2):
        joined = outcome(compiled, messages, None, is_reply=is_reply)
        assert joined == outcome(compiled, messages, RENDERED, is_reply=is_reply)


FILTERS = sorted(set(Environment(datetime.now).filters) - {"random"})
TESTS = sorted(Environment(datetime.now).tests)
ATOMS = st.sampled_from(
    ["x", "x", "x", "y", "r", "m", "messages", "contents", "'a'", "'<'", "''", "1", "0", "none", "true", "[]", "{}"]
)


def compound(inner):
    def written(form, *parts):
        return st.tuples(*parts).map(lambda drawn: form.format(*drawn))

    methods = st.sampled_from(["strip", "split", "startswith", "endswith", "upper", "join", "format", "get", "items"])
    operators = st.sampled_from(["+", "~", "*", "%", "-", "==", "!=", "<", "in", "not in", "and", "or"])
    return st.one_of(
        written("({} {} {})", inner, operators, inner),
        written("({} | {})", inner, st.sampled_from(FILTERS)),
        written("({} | {}({}))", inner, st.sampled_from(FILTERS), inner),
        written("({} | map('{}') | list)", inner, st.sampled_from(FILTERS)),
        written("({} | map(attribute={}) | list)", inner, inner),
        written("({} | selectattr('content', '{}', {}) | list)", inner, st.sampled_from(TESTS), inner),
        written("({} is {})", inner, st.sampled_from(TESTS)),
        written("({} is {}({}))", inner, st.sampled_from(TESTS), inner),
        written("{}.{}()", inner, methods),
        written("{}.{}({})", inner, methods, inner),
        written("{}[{}]", inner, inner),
        written("{}[{}:]", st.sampled_from(["x", "m", "contents", "messages"]), inner),
        written("[{}, {}]", inner, inner),
        written("{{'content': {}, 'a': {}}}", inner, inner),
        written("({} if {} else {})", inner, inner, inner),
        written("f({}, {})", inner, inner),
        written("dict(content={})", inner),
        written("namespace(content={}).content", inner),
        written("({}, )", inner),
    )


EXPRESSIONS = st.recursive(ATOMS, compound, max_leaves=6)
AROUND = (
    "{{% macro f(a, b) %}}{{{{ a }}}}{{{{ b if b }}}}{{% endmacro %}}"
    "{{% set contents = messages | map(attribute='content') | list %}}"
    "{{% for m in messages %}}{{% set x = m.content %}}{{% set y = messages[-1].content %}}"
    "{{% set r = m.role %}}{}{{% endfor %}}"
)
STATEMENTS = st.sampled_from(
    [
        "{{{{ {0} }}}}",
        "{{% if {0} %}}1{{% endif %}}",
        "{{% for z in {0} %}}{{{{ z }}}}{{% endfor %}}",
        "{{% set z %}} {{{{ {0} }}}}{{% endset %}}{{{{ z }}}}{{{{ z | trim }}}}",
        "{{% filter {1} %}}{{{{ {0} }}}}{{% endfilter %}}",
        "{{% set z, w = {0} %}}{{{{ z }}}}",
        "{{{{ loop.changed({0}) }}}}",
        "{{% autoescape true %}}{{{{ {0} }}}}{{% endautoescape %}}",
        "{{% call f({0}, 1) %}}{{{{ x }}}}{{% endcall %}}",
    ]
)


@settings(deadline=None)
@given(
    body=st.lists(st.builds(str.format, STATEMENTS, EXPRESSIONS, st.sampled_from(FILTERS)), min_size=1, max_size=2).map(
        "".join
    ),
    messages=CONVERSATIONS_OF_ANY_ROLES | ALTERNATING,
)
def test_whatever_a_template_does_a_joined_prompt_is_the_rendered_one(body, messages):
    try:
        compiled = template(AROUND.format(body))
    except jinja2.TemplateSyntaxError:
        assume(False)
    joined = outcome(compiled, messages, None, is_reply=True)
    if " at 0x" not in str(joined):
        assert joined == outcome(compiled, messages, RENDERED, is_reply=True)


@pytest.mark.parametrize("name", SHAPED)
def test_an_ordinary_conversation_has_a_shape(name):
    compiled = template(SHAPED[name])
    for contents in (["hi"], [" hi \n", "x", "12"]):
        messages = conversation(*contents)
        assert has_shape(compiled, messages)
        assert compiled.render(messages) == compiled.render(messages, RENDERED)


@pytest.mark.parametrize("name", SHAPELESS)
def test_what_may_depend_on_a_contents_text_has_no_shape(name):
    compiled = template(SHAPELESS[name])
    assert not has_shape(compiled, conversation("hi", "x", "12"))
    assert not has_shape(compiled, conversation("hi", "x", "12"))


def test_the_probes_without_tools_have_shapes():
    compiled = ChatTemplate(DEMO, [SpecialToken("\ue000")])
    plain = [probe for probe in CONVERSATIONS if not probe.tools]
    assert plain
    for probe in plain:
        prompt = compiled._shapes.prompt(probe.messages, is_reply=probe.is_reply)
        assert prompt == compiled.render(probe.messages, RENDERED, is_reply=probe.is_reply)[0].text


def test_roles_that_a_template_refuses_have_no_shape_and_others_do():
    compiled = template(GEMMA)
    assert has_shape(compiled, conversation("a", "b"))
    wrong = [*conversation("a"), *conversation("b")]
    assert not has_shape(compiled, wrong)
    for _ in range(2):
        with pytest.raises(TemplateError, match="must alternate"):
            compiled.render(wrong)


@pytest.mark.parametrize(
    "messages",
    [
        conversation(""),
        conversation("a", "<"),
        [{"role": "user", "content": "x", "name": "n"}],
        [{"content": "x", "role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "bard", "content": "x"}],
    ],
    ids=str,
)
def test_messages_that_are_not_ordinary_are_rendered(messages):
    assert not has_shape(template(CHATML), messages)


def test_control_tokens_that_could_be_spelt_by_roles_turn_shapes_off():
    assert not has_shape(ChatTemplate(CHATML, [SpecialToken("user")]), conversation("a"))


def test_developer_is_shown_as_the_template_knows_it():
    messages = [{"role": "developer", "content": "x"}]
    for source in (CHATML, CHATML + "{# developer #}"):
        compiled = template(source)
        assert has_shape(compiled, messages)
        assert compiled.render(messages) == compiled.render(messages, RENDERED)


def test_a_prompt_too_long_is_refused_as_it_is_rendered():
    limits = TemplateLimits(output_chars=1000)
    doubled = template("{{ '-' * 100 }}{{ messages[0].content }}{{ messages[0].content }}", limits=limits)
    assert has_shape(doubled, conversation("x" * 400))
    for num_chars in (400, 401):
        messages = conversation("x" * num_chars)
        joined = outcome(doubled, messages, None, is_reply=True)
        assert joined == outcome(doubled, messages, RENDERED, is_reply=True)
    assert "more than 1000 characters" in joined[0]


def test_loops_are_counted_before_there_is_a_shape():
    endless = template(
        "{% for i in range(99) %}{{ messages[0].content }}{% endfor %}", limits=TemplateLimits(iterations=50)
    )
    assert not has_shape(endless, conversation("x"))
    with pytest.raises(TemplateError, match="looped more than 50 times"):
        endless.render(conversation("x"))


@pytest.mark.parametrize("written", ["{{ messages[0].content }}", "0123456789"])
def test_a_shape_has_a_bounded_size(written):
    compiled = template("{% for i in range(9999) %}" + written + "{% endfor %}")
    assert not has_shape(compiled, conversation("x"))
    assert compiled.render(conversation("x")) == compiled.render(conversation("x"), RENDERED)


def test_there_is_a_bounded_number_of_shapes():
    compiled = template(CHATML)
    for number in range(2000):
        roles = f"{number:b}".replace("0", "u").replace("1", "a")
        messages = [{"role": {"u": "user", "a": "assistant"}[role], "content": "x"} for role in roles]
        assert has_shape(compiled, messages)
    assert len(compiled._shapes._shapes) <= 256
    assert not has_shape(compiled, conversation(*"x" * 129))


def test_shapes_are_learned_on_several_threads():
    compiled, prompts = template(CHATML), [[], [], [], []]

    def render(own):
        own.extend(compiled.render(conversation(*"abc"[:number]))[0].text for number in (1, 2, 3) * 50)

    threads = [threading.Thread(target=render, args=(own,)) for own in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [compiled.render(conversation(*"abc"[:number]), RENDERED)[0].text for number in (1, 2, 3)]
    assert prompts == [expected * 50] * 4


def test_a_template_gets_a_list_of_messages_whatever_the_caller_has():
    compiled = template("{{ messages + [1] }}{# developer #}")
    assert compiled.render(tuple(conversation("x"))) == compiled.render(conversation("x"))
