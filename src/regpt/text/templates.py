"""Chat templates of our own, for models that come without one."""

# Of a base model: no token that its tokenizer lacks. `<|endoftext|>` begins a conversation, as it begins every
# document, and ends every answer; roles are words, so a user can write them, and a model can be led by that.
PLAIN = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:\\n' + message.content + eos_token }}
{%- elif message.role == 'user' or message.role == 'system' or message.role == 'tool' %}
{{- message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
{%- else %}{{ raise_exception('no role is called ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""

# OpenAI's ChatML, as Qwen has it: two tokens that no user can write mark every message.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"plain": PLAIN, "chatml": CHATML}
