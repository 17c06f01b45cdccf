"""Chat templates of our own, which do what those of model families do, construct by construct."""
# ruff: noqa: E501  (templates read best on one line)

from __future__ import annotations

_TYPESCRIPT = """{%- macro type_of(spec, depth) -%}
    {%- if spec.enum is defined -%}{%- for e in spec.enum -%}{{ '"' ~ e ~ '"' if e is string else e }}{%- if not loop.last %} | {% endif -%}{%- endfor -%}
    {%- elif spec.anyOf is defined -%}{{ spec.anyOf | map(attribute='type') | join(' | ') }}
    {%- elif spec.type is iterable and spec.type is not string -%}{{ spec.type | join(' | ') }}
    {%- elif spec.type == 'array' -%}{{ type_of(spec['items'], depth) }}[]
    {%- elif spec.type == 'object' -%}{
{% for name, inner in spec.properties.items() %}{{ '  ' * (depth + 1) }}{% if inner.description %}// {{ inner.description }}
{{ '  ' * (depth + 1) }}{% endif %}{{ name }}{{ '' if name in (spec.required or []) else '?' }}: {{ type_of(inner, depth + 1) }}{% if inner.default is defined %} = {{ inner.default | tojson }}{% endif %},
{% endfor %}{{ '  ' * depth }}}
    {%- elif spec.type in ['number', 'integer'] -%}number
    {%- else -%}{{ spec.type or 'any' }}
    {%- endif -%}
{%- endmacro -%}
"""
_LOOP = "{% for message in messages %}"

# Those that change what a message says so much that it cannot be continued.
CHANGING = {"minimax", "jamba", "formats"}

FAMILIES: dict[str, str] = {
    "chatml": _LOOP
    + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml, default system": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}{% endfor %}",
    "qwen 2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be Q.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n{\\"name\\": <name>}<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen 3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|' + message.role + '|>\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|' + message.role + '|>\\n' + content }}{%- endif %}
    {%- else %}{{- '<|' + message.role + '|>\\n' + content }}{%- endif %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}
""",
    "qwen coder, xml": """{% macro rest(spec, known) %}{% if spec is mapping %}{% for key in spec | list if key not in known %}{{ '\\n<' ~ key ~ '>' ~ (spec[key] | tojson | safe if spec[key] is mapping or (spec[key] is sequence and spec[key] is not string) else spec[key] | string) ~ '</' ~ key ~ '>' }}{% endfor %}{% endif %}{% endmacro %}
{%- if tools is iterable and tools | length > 0 %}
    {%- for tool in tools %}
        {%- set tool = tool.function if tool.function is defined else tool %}
        {{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
        {%- if tool.parameters is mapping and tool.parameters.properties is mapping %}
            {%- for name, spec in tool.parameters.properties | items %}
                {{- '\\n<parameter><name>' ~ name ~ '</name>' }}{{- rest(spec, ['name', 'description']) }}{{- '</parameter>' }}
            {%- endfor %}
        {%- endif %}
        {{- rest(tool, ['type', 'name', 'description', 'parameters']) }}{{- '\\n</function>' }}
    {%- endfor %}
{%- endif %}
{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}
<parameter={{ k }}>
{% set v = v if v is string else v | tojson | safe %}{{ v }}
</parameter>{% endfor %}</function>{% endfor %}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}""",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "llama 3.1": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|sys|>Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{{- raise_exception("No first user message") }}{%- endif %}
    {{- '<|user|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("One tool call at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|assistant|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|ipython|>\\n\\n" }}{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n\\n' }}{%- endif %}
""",
    "llama, python calls": """{% for m in messages %}<{{ m.role }}>{% if m.tool_calls is defined and m.tool_calls is not none %}[{% for c in m.tool_calls %}{{ c.function.name }}({% for name, value in c.function.arguments.items() %}{{ name }}={{ '"%s"' | format(value) if value is string else value }}{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]{% else %}{{ m.content }}{% endif %}
{% endfor %}""",
    "mistral v1": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}",
    "mistral v3": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("Roles must alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}{%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}{{- raise_exception("Ids must have length 9!") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}{%- set content = message.content.content %}{%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content | string + ", " }}{{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles") }}{%- endif %}
{%- endfor %}
""",
    "mistral v7": """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are M. The date is " + today + ".\\n\\nWhen you don't know, say so." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content'] %}{%- else %}{%- set system_message = messages[0]['content'][0]['text'] %}{%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{%- set system_message = default_system_message %}{%- set loop_messages = messages %}{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}{{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST]' }}{%- for block in message['content'] %}{%- if block['type'] == 'text' %}{{- block['text'] }}{%- elif block['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}{%- else %}{{- raise_exception('Only text and image blocks') }}{%- endif %}{%- endfor %}{{- '[/INST]' }}{%- endif %}
    {%- elif message['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user, system and assistant roles!') }}{%- endif %}
{%- endfor %}
""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
    "gemma 3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}{%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("Roles must alternate") }}{%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
""",
    "gemma, declared functions": """{%- macro escaped(value) -%}{%- if value is string -%}{{ '<q>' + value + '<q>' }}{%- elif value is boolean -%}{{ 'true' if value else 'false' }}{%- elif value is mapping -%}{%- set ns = namespace(some=false) -%}{{- '{' -}}{%- for key, inner in value | dictsort -%}{%- if ns.some %},{% endif -%}{%- set ns.some = true -%}{{- key -}}:{{- escaped(inner) -}}{%- endfor -%}{{- '}' -}}{%- elif value is sequence -%}[{%- for inner in value -%}{{- escaped(inner) -}}{%- if not loop.last %},{% endif -%}{%- endfor -%}]{%- else -%}{{ value }}{%- endif -%}{%- endmacro -%}
{{ bos_token }}{% for tool in tools or [] %}<decl>{{ tool['function']['name'] }}{{ escaped(tool['function']['parameters']) | trim }}</decl>{% endfor %}
{% for message in messages %}<{{ message['role'] }}>{% for call in message.get('tool_calls', []) %}<call>{{ call['function']['name'] }}{{ escaped(call['function']['arguments']) }}</call>{% endfor %}{{ message['content'] | trim }}
{% endfor %}""",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi 4 mini": "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "smollm 3": """{%- set reasoning_mode = "/think" if enable_thinking | default(true) else "/no_think" -%}
{%- set date = strftime_now("%d %B %Y") if today is not defined else today -%}
{%- if messages[0].role == "system" -%}{%- set system_message = messages[0].content -%}
    {%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
    {%- set custom_instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n## Metadata\\nDate: " ~ date ~ "\\nMode: " ~ reasoning_mode ~ "\\n\\n" -}}
{%- if custom_instructions -%}{{- custom_instructions + "\\n\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}{{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}{% generation %}{%- if reasoning_mode == "/think" -%}{{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}{%- else -%}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}{%- endif -%}{% endgeneration %}
    {%- elif message.role == "tool" -%}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" if reasoning_mode == "/think" else "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}{%- endif -%}
""",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "vicuna": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] | trim + ' ' %}{% else %}{% set loop_messages = messages %}{% set system_message = 'A chat. ' %}{% endif %}{{ bos_token + system_message }}{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] | trim + ' ' }}{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "alpaca": "{% for message in messages %}{{ {'user': '### Instruction:', 'assistant': '### Response:', 'system': ''}.get(message.role, '### ' ~ message.role | capitalize ~ ':') }}{{ '\\n' + message.content if loop.index > 1 or message.role != 'system' else message.content }}\n\n{% endfor %}{{ '### Response:\\n' if add_generation_prompt }}",
    "deepseek 3": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}{{'<｜Assistant｜><｜calls｜>' + tool['type'] + '<｜sep｜>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] | tojson + '\\n```'}}{%- set ns.is_first = true -%}{%- else %}{{'\\n' + tool['function']['name']}}{%- endif %}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<｜outputs｜>' + message['content']}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n' + message['content']}}{%- endif %}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "command r": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = '## Task' %}{% endif %}{{ '<|SYSTEM|>' + system_message }}
{% for document in documents or [] %}
{{ "Document: " ~ loop.index0 ~ "\\n" }}
{% for key, value in document.items() %}
{{ key }}: {{ value }}
{% endfor %}
{% endfor %}
{% for message in loop_messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|USER|>' + content.strip() }}{% elif message['role'] == 'assistant' %}{{ '<|CHATBOT|>'  + content.strip() }}{% endif %}{% endfor %}""",
    "command r, tools as python": """{%- macro kind(param) -%}{%- set types = {'string': 'str', 'integer': 'int', 'number': 'float', 'boolean': 'bool', 'array': 'List', 'object': 'Dict'} -%}{{ types[param.type] if param.type is string else 'Union[' ~ param.type | default(['any'], true) | map('title') | join(', ') ~ ']' }}{%- endmacro -%}
{%- for tool in tools or [] %}
def {{ tool.function.name }}({% for name, param in tool.function.parameters.properties.items() %}{{ name }}: {% if name not in tool.function.parameters.required %}Optional[{{ kind(param) }}] = {{ param.default | default(none) }}{% else %}{{ kind(param) }}{% endif %}{{ ', ' if not loop.last }}{% endfor %}):
    \"\"\"{{ tool.function.description | indent(4) }}\"\"\"
{% endfor %}
{% for message in messages %}{{ message.role | upper }}: {{ message.content }}
{%- if message.tool_calls %}
Action: ```json
{{ message.tool_calls | map(attribute='function') | list | tojson(indent=4) }}```
{%- endif %}

{% endfor %}""",
    "granite": """{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = "Knowledge Cutoff: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}{%- set system_message = system_message + " Use both." %}{%- elif tools %}{%- set system_message = system_message + " Use tools." %}{%- elif documents %}{%- set system_message = system_message + " Use documents." %}{%- else %}{%- set system_message = system_message + " Help." %}{%- endif %}
    {%- set loop_messages = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}{%- endif %}
{%- if documents %}{%- for document in documents %}{{- '<|start_of_role|>document {"document_id": "' + document['doc_id'] | string + '"}<|end_of_role|>\\n' }}{{- document['text'] }}{{- '<|end_of_text|>\\n' }}{%- endfor %}{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}
{%- endfor %}""",
    "olmo": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    "yi": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% endif %}{% if system_message is defined %}{{ system_message }}{% endif %}{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}",
    "internlm": "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + (' name=<|plugin|>' if message.name is defined else '') + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}",
    "falcon 3": """{%- if tools %}{{- '<|system|>\\nTools:\\n' + tools | tojson(indent=2) + '\\n' }}{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}{%- endif %}{%- endfor %}{%- endif %}
{%- for message in messages %}{% if message['role'] == 'assistant' %}{% if message['tool_calls'] %}{% for tool in message['tool_calls'] %}{% set args = tool['function']['arguments'] if tool['function']['arguments'] is string else tool['function']['arguments'] | tojson %}{{ '<tool_call>' ~ args ~ '</tool_call>' }}{% endfor %}{% elif not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% else %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "glm 4": """[gMASK]<sop>
{%- if tools -%}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{%- endif -%}
{%- macro visible_text(content) -%}{%- if content is string -%}{{- content }}{%- elif content is iterable and content is not mapping -%}{%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}{%- endfor -%}{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last_user_index = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible_text(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set content = visible_text(m.content) %}
{%- if loop.index0 > ns.last_user_index and m.reasoning_content -%}{{ '\\n<think>' + m.reasoning_content.strip() + '</think>' }}{%- else -%}{{ '\\n<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{% for tc in m.tool_calls %}{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}{% for k, v in _args.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>{% endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}{{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
{%- elif m.role == 'system' -%}<|system|>
{{ visible_text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}{%- endif -%}""",
    "hermes, tools": """{%- macro json_to_python_type(spec) %}{%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}{%- if basic[spec.type] is defined %}{{- basic[spec.type] }}{%- elif spec.type == "array" %}{{- "list[" + json_to_python_type(spec | items | map('last') | last) + "]" }}{%- elif spec.type == "object" %}{%- if spec.additionalProperties is defined %}{{- "dict[str, any]" }}{%- else %}{{- "dict" }}{%- endif %}{%- elif spec.type is iterable %}{{- "Union[" }}{%- for t in spec.type %}{{- json_to_python_type({"type": t}) }}{%- if not loop.last %}{{- "," }}{%- endif %}{%- endfor %}{{- "]" }}{%- else %}{{- "Any" }}{%- endif %}{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\n<tools> ' }}
{%- for tool in tools or [] %}{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
{{- '{"name": "' + tool.name + '", "description": "' + tool.name + '(' }}{%- for name, fields in tool.parameters.properties | items %}{{- name + ": " + json_to_python_type(fields) }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- ")" }}{%- if tool.return is defined %}{{- " -> " + json_to_python_type(tool.return) }}{%- endif %}{{- '", "parameters": ' }}{{- tool.parameters.properties | tojson }}{{- "}" }}{%- if not loop.last %}{{- "\\n" }}{%- endif %}
{%- endfor %}{{- ' </tools><|im_end|>\\n' }}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- if message.role == 'tool' and loop.previtem and loop.previtem.role != 'tool' %}{{- '(first)' }}{%- endif %}{%- if not loop.last and loop.nextitem.role == 'tool' %}{{- '(calls)' }}{%- elif loop.last %}{{- '(end)' }}{%- endif %}{%- endfor %}""",
    "harmony": _TYPESCRIPT
    + """{%- macro system() -%}{{- "Knowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}{{- "Reasoning: " + reasoning_effort + "\\n" }}{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{- system() }}{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}{%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set developer_message = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer_message or tools %}{{- "<|start|>developer<|message|>" }}{%- if developer_message %}{{- "# Instructions\\n\\n" + developer_message }}{%- endif %}
{%- if tools %}{{- "\\n\\nnamespace functions {\\n\\n" }}{%- for tool in tools %}{{- "// " + tool.function.description + "\\ntype " + tool.function.name + " = (_: " }}{{- type_of(tool.function.parameters, 0) }}{{- ") => any;\\n\\n" }}{%- endfor %}{{- "}" }}{%- endif %}{{- "<|end|>" }}{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and ("<|channel|>analysis" in message.content or "<|channel|>final" in message.content) %}{{- raise_exception("No channels in content") }}{%- endif %}
        {%- if "tool_calls" in message %}
            {%- set future_final_message = namespace(found=false) %}{%- for future_message in loop_messages[loop.index:] %}{%- if future_message.role == 'assistant' and "tool_calls" not in future_message %}{%- set future_final_message.found = true %}{%- endif %}{%- endfor %}
            {%- set tool_call = message.tool_calls[0].function %}{%- if message.thinking and not future_final_message.found %}{{- "<|analysis|>" + message.thinking }}{%- endif %}
            {{- "<|start|>assistant to=functions." + tool_call.name + "<|json|>" + tool_call.arguments | tojson + "<|call|>" }}{%- set last_tool_call.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}{%- if "thinking" in message %}{{- "<|analysis|>" + message.thinking + "<|end|>" }}{%- endif %}{{- "<|final|>" + message.content + "<|return|>" }}
        {%- else %}{{- "<|final|>" + message.content + "<|end|>" }}{%- set last_tool_call.name = none %}{%- endif %}
    {%- elif message.role == 'tool' -%}{%- if last_tool_call.name is none %}{{- raise_exception("A tool's message must follow a call!") }}{%- endif %}{{- "<|start|>functions." + last_tool_call.name + " to=assistant<|message|>" + message.content | tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "kimi": """{%- macro render_content(msg) -%}{%- set c = msg.get('content') -%}{%- if c is string -%}{{ c }}{%- elif c is not none -%}{% for content in c -%}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}<image>{% else -%}{{ content['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}{%- for idx in range(messages | length - 1, -1, -1) -%}{%- if messages[idx]['role'] == 'assistant' and not messages[idx].get('tool_calls') -%}{%- set ns.last = idx -%}{%- break -%}{%- endif -%}{%- endfor -%}
{%- set hist = messages[:ns.last + 1] -%}{%- set suffix = messages[ns.last + 1:] -%}
{%- if tools -%}<|tools|>{{ tools | tojson(separators=(',', ':')) }}{%- endif -%}
{%- for m in hist + suffix -%}{%- if loop.first and messages[0]['role'] != 'system' -%}<|system|>K.{%- endif -%}<|{{ m.get('name') or m['role'] }}|>{{ render_content(m) }}{%- if m['role'] == 'tool' -%}{%- set tool_call_id = m.tool_call_id -%}## {{ tool_call_id }}{%- endif -%}<|end|>{%- endfor -%}""",
    "minimax": """{%- set ns = namespace(out=[]) %}{%- for m in messages %}{%- if m.role == 'system' %}{% continue %}{% endif %}{%- set ns.out = ns.out + [m.role ~ '|' ~ m.content | replace('\\n', '\\\\n')] %}{%- endfor %}{{ ns.out | join(' // ') }}|{{ ns.out | length }}|{{ ns.out | first }}|{{ ns.out[-1:] }}|{{ (ns.out | last).split('|', 1) }}""",
    "exaone": "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}{% if not message['role'] == 'user' %}{{ '[|endofturn|]' }}{% endif %}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n[|assistant|]' }}{% endif %}",
    "jamba": """{%- set known = messages | map(attribute='role') | unique | list -%}{{ bos_token }}<|known|>{{ known | sort | join(',') }}{%- for role, group in messages | groupby('role') %}<{{ role }}:{{ group | length }}>{%- endfor -%}{%- for message in messages | rejectattr('role', 'in', ['system', 'developer']) %}
<|{{ 'bom' if loop.index is odd else 'eom' }}|>{{ message.content | default('', true) | trim | truncate(30, true, '') }}{%- endfor -%}""",
    "nemotron": """{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}{{ '<SPECIAL_10>System\\n' }}{%- filter trim %}
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{% endfilter -%}{{ '\\n\\n' }}{%- for message in messages if message.role != 'system' -%}{{ '<SPECIAL_11>' ~ message.role.title() ~ '\\n' ~ message.content }}{{ '\\n' }}{%- if message is sameas last %}{{ '*' }}{% endif -%}{%- else -%}{{ 'nobody' }}{%- endfor -%}""",
    "metharme": """{%- if messages[0].role == 'system' %}{{- '<|system|>' ~ messages[0].content }}{% set messages = messages[1:] %}{% endif -%}{%- for message in messages recursive -%}<|{{ 'model' if message.role == 'assistant' else message.role }}|>{{ message.content }}{%- if message.tool_calls is defined -%}{{ loop([{'role': 'call', 'content': message.tool_calls[0].function.name}]) }}{%- endif -%}{%- endfor -%}""",
    "lfm": """{{- bos_token -}}{%- set ns = namespace(system_prompt="", last_assistant_index=-1) -%}{%- if messages[0]["role"] == "system" -%}{%- set ns.system_prompt = messages[0]["content"] -%}{%- set messages = messages[1:] -%}{%- endif -%}{%- if tools -%}{%- set ns.system_prompt = ns.system_prompt + ("\\n" if ns.system_prompt else "") + "List of tools: [" -%}{%- for tool in tools -%}{%- if tool is not string -%}{%- set tool = tool | tojson -%}{%- endif -%}{%- set ns.system_prompt = ns.system_prompt + tool -%}{%- if not loop.last -%}{%- set ns.system_prompt = ns.system_prompt + ", " -%}{%- endif -%}{%- endfor -%}{%- set ns.system_prompt = ns.system_prompt + "]" -%}{%- endif -%}{%- if ns.system_prompt -%}{{- "<|im_start|>system\\n" + ns.system_prompt + "<|im_end|>\\n" -}}{%- endif -%}{%- for message in messages -%}{{- "<|im_start|>" + message["role"] + "\\n" -}}{%- set content = message["content"] -%}{%- if content is not string -%}{%- set content = content | tojson -%}{%- endif -%}{%- if message["role"] == "tool" -%}{%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}{%- endif -%}{{- content + "<|im_end|>\\n" -}}{%- endfor -%}""",
    "apertus": _TYPESCRIPT
    + """{%- set block %}{% for tool in tools or [] %}
type {{ tool.function.name }} = {{ type_of(tool.function.parameters, 1) }};
{% endfor %}{% endset -%}{{ block | trim | default('no tools', true) }}{%- for message in messages -%}{%- with role = message.role, text = message.content -%}[{{ role }}:{{ text }}]{%- endwith -%}{%- endfor -%}{% raw %}{{ raw }}{% endraw %}""",
    "functionary": """{%- macro each(items) %}{% for i in items %}{{ caller(i) }}{% endfor %}{% endmacro %}{%- macro wrap(name) %}<{{ name }}{{ ' ' ~ kwargs | dictsort | map('join', '=') | join(' ') if kwargs }}>{{ caller() }}</{{ name }}>{% endmacro %}{%- for message in messages %}{%- call wrap(message.role, n=loop.index, of=loop.length) %}{{ message.content | string }}{% endcall %}{%- call(x) each([1, 2]) %}{{ x }}{% endcall %}{%- endfor %}""",
    "formats": """{%- for message in messages %}{{ '%-10s|%3d|%5.1f%%' % (message.role, loop.index, loop.index / loop.length * 100) }}|{{ '{:>12}'.format(message.role) }}|{{ "{0}-{name}".format(loop.index0, name=message.role) }}|{{ message.content | length }}|{{ message.content[:5] | upper }}|{{ message.content.splitlines() | list }}|{{ message.content.partition(' ')[0] }}|{{ message.content.find('e') }}|{{ message.content.rsplit(' ', 1)[-1] }}|{{ message | items | list | length }}
{% endfor %}{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1e16 }} {{ 0.1 + 0.2 }} {{ 10 / 4 }} {{ none }} {{ true }} {{ [1, 'a', none] }} {{ {'k': (1,)} }}""",
    "logic": """{%- set has_system = messages | selectattr('role', 'equalto', 'system') | list | length > 0 -%}{%- set n = namespace(u=0, a=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set n.u = n.u + 1 -%}{%- elif m.role == 'assistant' -%}{%- set n.a = n.a + 1 -%}{%- endif -%}{%- if n.u > 3 -%}{%- break -%}{%- endif -%}{%- endfor -%}{{ has_system }}{{ n.u }}{{ n.a }}{{ 'x' if has_system else 'y' }}{{ missing is undefined }}{{ missing }}{{ messages[0].missing is defined }}{{ 'a' in 'abc' and 1 < 2 <= 2 }}{{ not messages }}{{ messages | map(attribute='content') | map('length') | sum }}{{ (messages | map(attribute='role') | list).index('user') if 'user' in messages | map(attribute='role') }}{{ custom.a if custom is mapping }}{{ [] | first is defined }}{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': [1.0, none]} | tojson(sort_keys=true) }}""",
    "white space": "  {% if true %}\n  line one\n    {%- if true %}\n  two  {% endif %}\n\n  {#- gone -#}  \n{% for m in messages %}\n  * {{ m.role -}}   \n  :  {{- m.content }}\n{% endfor %}\n{% endif %}  tail\n\n",
}
