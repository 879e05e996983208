"""Chat templates: real ones against transformers' own renderer, hostile ones stopped early and cheaply."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from petalite.errors import InvalidArgument, InvalidCheckpoint, PetaliteError
from petalite.model.chat import ChatTemplate
from petalite.model.sandbox import RenderLimits

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind. <b>&amp;</b>"},
    {"role": "user", "content": "Hello  \n"},
    {
        "role": "assistant",
        "content": "Hi é🙂",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}],
    },
    {"role": "user", "content": [{"type": "text", "text": "What?"}]},
]
# The constructs that templates of released models are made of.
TEMPLATES = {
    "chatml": """
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content']|string + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": """
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
    {% set rest = messages %}
{% endif %}
{% for m in rest %}
    {% if loop.index0 == 0 %}
        {% set content = '<<SYS>>' + system + '<</SYS>>' + m['content'] %}
    {% else %}
        {% set content = m['content'] %}
    {% endif %}
    {{- bos_token + '[INST] ' ~ content|string|trim ~ ' [/INST]' }}
{% endfor %}""",
    "namespace": """
{% set ns = namespace(found=false, n=0) %}
{% for m in messages %}
    {% set ns.n = ns.n + 1 %}
    {% if m.role == 'assistant' %}{% set ns.found = true %}{% endif %}
{% endfor %}
{{ ns.found }} {{ ns.n }}""",
    "macro": """
{% macro show(m, last=false) %}
{{ m.role|upper }}: {{ m.content if m.content is string else m.content[0].text }}{% if last %}!{% endif %}
{% endmacro %}
{% for m in messages %}{{ show(m, loop.last) }}{% endfor %}""",
    "tools": """
{% for m in messages if m.tool_calls is defined %}
    {% for call in m.tool_calls %}
        {{- call.function|tojson }}{{ call.function.arguments|tojson(indent=2) }}
        {%- for k, v in call.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}
    {% endfor %}
{% endfor %}""",
    "filters": """
{{ messages|map(attribute='role')|join(', ') }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ messages|rejectattr('role', 'in', ['user'])|map(attribute='role')|list }}
{{ (messages|last).role }} {{ messages[::-1][0].role }}
{{ messages[0].content|replace('kind', 'brief')|lower }} {{ ['a', 1, none]|join }} {{ {'b': [2]}|dictsort }}
{{ messages|map(attribute='role')|unique|sort|join('|') }}""",
    "operators": """
{{ 'x' * 3 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ '%s-%d' % ('a', 3) }}
{{ none is none }} {{ not 1 > 2 }}
{{ 'a,b'.split(',') }} {{ '-'.join(['a', 'b']) }} {{ 'aXbX'.replace('X', 'YY', 1) }} {{ '{}!'.format('a') }}
{{ range(2, 9, 3)|list }} {{ dict(a=1).items()|list }} {{ undefined_name }} {{ 'b' in 'abc' }}""",
    "controls": """
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 3 -%}{%- break -%}{%- endif -%}
    {{- m.role -}}
{%- endfor -%}
{% generation %}text{% endgeneration %}""",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(template: str, add_generation_prompt: bool) -> None:
    expected, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )
    rendered = ChatTemplate(template, {"bos_token": "<s>"}).render(
        CHAT, add_generation_prompt=add_generation_prompt
    )
    assert rendered == expected[0]


def test_a_date_is_todays() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(CHAT) == time.strftime("%Y")


# -- hostile ---------------------------------------------------------------------------------------------


def looped(times: int, begin: str, body: str) -> str:
    """`body` again and again over a namespace `ns` that begins as `begin`."""
    return f"{{% set ns = namespace({begin}) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}"


# Structures of 2^60 leaves each, in 60 small lists: endless to print, compare, hash or walk.
SHARED = looped(
    60,
    "a=['x'], b=['x'], t=(1,)",
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}",
)
WALKS = """ ns.a; ns.a == ns.b; ns.a in [ns.b]; ns.a is eq(ns.b); ns.a ~ 'x'; '%s' % (ns.a,);
'{}'.format(ns.a); {ns.t: 1}; {}[ns.t]; dict([(ns.t, 1)]); {}.get(ns.t); ns.a.count(ns.b); ns.a|tojson;
ns.a|string; [ns.a, ns.b]|sort; [ns.t]|unique|list; [ns.a]|join; ns.a|trim; ns.a|replace('a', 'b');
[1]|map(ns.a)|list; raise_exception(ns.a); strftime_now(ns.a) """
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "lists in loops": "{% for i in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "huge output": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "multiplied text": "{{ 'a' * 10**10 }}",
    "multiplied list": "{{ ['a' * 100000] * 100000 }}",
    "doubled by ~": looped(60, "s='a'", "{% set ns.s = ns.s ~ ns.s %}"),
    "doubled by +": looped(60, "s='a'", "{% set ns.s = ns.s + ns.s %}"),
    "doubled by set": looped(60, "s='a'", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "hoarded": looped(99999, "l=[]", "{% set ns.l = ns.l + [i ~ 'a' * 100000] %}"),
    "hoarded slices": looped(99999, "l=[], s='a' * 20000", "{% set ns.l = [ns.l, ns.s[:-1]] %}"),
    "hoarded splits": looped(99999, "l=[], s='a b' * 9000", "{% set ns.l = [ns.l, ns.s.split('b')] %}"),
    "hoarded lists": looped(99999, "l=[]", "{% set ns.l = [ns.l, [" + "1," * 2000 + "]] %}"),
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "forking macro": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squares": looped(90, "n=9", "{% set ns.n = ns.n * ns.n %}"),
    "% width": "{{ '%1000000000d' % 1 }}",
    "% star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:>{w}}'.format(1, w=1000000000) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(1000000) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "indent": "{{ ('x\n' * 10000)|indent(1000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join": "{{ ''.join(['a' * 100000] * 100000) }}",
    "join filter": "{{ (['a' * 100000] * 100000)|join }}",
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "filler text": "{{ lipsum(100000) }}",
    "include": "{% include 'x' %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "function globals": "{{ raise_exception.__globals__.os }}",
    "format attribute": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "private namespace": "{{ namespace(_x=1) }}",
    "mutation": "{{ messages.append(1) }}",
    "deep template": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "long template": "x" * (1 << 19),
    "many tokens": "{{ [" + "1," * 50_000 + "] }}",
    "syntax": "{% if %}",
    **{f"shared: {walk.strip()}": SHARED + "{{ " + walk + " }}" for walk in WALKS.split(";")},
}
LIMITS = RenderLimits(text_chars=30_000, work_chars=5_000_000, time_s=0.2)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_stopped(template: str) -> None:
    """Within the set time (and a little), in little memory, as one sentence."""
    tracemalloc.start()
    began_s = time.process_time()  # which other programs do not use up
    try:
        with pytest.raises(PetaliteError) as caught:
            ChatTemplate(template, limits=LIMITS).render(CHAT)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, InvalidArgument | InvalidCheckpoint)
    assert time.process_time() - began_s < 20 * LIMITS.time_s
    assert peak_bytes < 256 << 20
    assert len(str(caught.value)) < 1000


def test_what_a_template_may_read_is_plain_json() -> None:
    class Message(dict[str, Any]):
        secret = "hidden"

    assert ChatTemplate("[{{ messages[0].secret }}]").render([Message(role="user", content="x")]) == "[]"


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidArgument, match="only users may speak"):
        ChatTemplate("{{ raise_exception('only users may speak') }}").render(CHAT)


def test_a_template_that_fails_on_these_messages() -> None:
    with pytest.raises(InvalidArgument, match="failed on these messages"):
        ChatTemplate("{{ messages[0].content + messages[3].content }}").render(CHAT)


@pytest.mark.parametrize("messages", [[], ["text"], [{"role": "user", "content": object()}], [{"x": float}]])
def test_what_is_no_chat(messages: Any) -> None:
    with pytest.raises(InvalidArgument, match="messages"):
        ChatTemplate("x").render(messages)


def test_a_budget_is_for_one_rendering() -> None:
    """A long conversation, rendered again and again, never runs out."""
    template = ChatTemplate(TEMPLATES["chatml"], limits=RenderLimits(200_000, 1_000_000, 5.0))
    chat = [{"role": "user", "content": "word " * 200}] * 100
    assert len({template.render(chat) for _ in range(20)}) == 1
