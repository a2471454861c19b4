"""Built-in templates against the families' own texts, written out by hand from what the families publish."""

from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.templates import BUILTIN, builtin_template
from dstune.data.tokenize import Encoder
from tests.data.made_tokenizers import byte_level

NOW = datetime(2024, 7, 26)
CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "look", "arguments": {"at": "sky", "n": 2}}}
AGAIN = {"type": "function", "id": "abcdefgh2", "function": {"name": "wait", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3.1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# What the assistant has to write stands between ⟦ and ⟧.
PLAIN = {
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n",
    "llama2": "<s>[INST] Q [/INST]⟦ A </s>⟧",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧",
    "llama3.1": "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\n⟦A<|im_end|>⟧\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n",
    "qwen3": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA<|im_end|>⟧\n",
    "mistral": "<s>[INST] Q[/INST]⟦ A</s>⟧",
    "gemma": "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n",
    "phi": "<|user|>\nQ<|end|>\n<|assistant|>\n⟦A<|end|>⟧\n</s>",
    "phi4": "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>⟦A<|im_end|>⟧",
    "zephyr": "<|user|>\nQ</s>\n<|assistant|>\n⟦A</s>⟧\n",
    "vicuna": f"<s>{VICUNA} USER: Q ASSISTANT:⟦ A</s>⟧",
    "deepseek": "<s><｜User｜>Q<｜Assistant｜>⟦A<｜end▁of▁sentence｜>⟧",
    "glm": "[gMASK]<sop><|user|>\nQ<|assistant|>⟦\n<think></think>\nA<|user|>⟧",
    "alpaca": f"{ALPACA}\n\n### Instruction:\nQ\n\n### Response:\n⟦A</s>⟧",
}
LONG = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]⟦ A </s>⟧<s>[INST] R [/INST]⟦ B </s>⟧",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦B<|eot_id|>⟧",
    "qwen2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nB<|im_end|>⟧\n",
    "mistral": "<s>[INST] S\n\nQ[/INST]⟦ A</s>⟧[INST] R[/INST]⟦ B</s>⟧",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>⟧\n",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n⟦A<|end|>⟧\n<|user|>\nR<|end|>\n<|assistant|>\n⟦B<|end|>⟧\n</s>",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n⟦A</s>⟧\n<|user|>\nR</s>\n<|assistant|>\n⟦B</s>⟧\n",
    "vicuna": "<s>S USER: Q ASSISTANT:⟦ A</s>⟧USER: R ASSISTANT:⟦ B</s>⟧",
    "deepseek": "<s>S<｜User｜>Q<｜Assistant｜>⟦A<｜end▁of▁sentence｜>⟧<｜User｜>R<｜Assistant｜>⟦B<｜end▁of▁sentence｜>⟧",
    "glm": "[gMASK]<sop><|system|>\nS<|user|>\nQ<|assistant|>⟦\n<think></think>\nA<|user|>⟧\nR<|assistant|>⟦\n<think></think>\nB<|user|>⟧",
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\n⟦A</s>⟧\n\n### Instruction:\nR\n\n### Response:\n⟦B</s>⟧",
}
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky", "n": 2}}\n</tool_call>'
TOOLS = {
    "qwen3": f"<|im_start|>system\n{QWEN_TOOLS}<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n"
    "<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA<|im_end|>⟧\n",
    "qwen2": f"<|im_start|>system\nYou are a helpful assistant.\n\n{QWEN_TOOLS}<|im_start|>user\nQ<|im_end|>\n"
    f"<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n"
    "<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please "
    "respond with a JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in the "
    'format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    '{\n    "type": "function",\n    "function": {\n        "name": "look",\n        "parameters": {\n'
    '            "type": "object"\n        }\n    }\n}\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    '⟦{"name": "look", "parameters": {"at": "sky", "n": 2}}<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n'
    '"blue"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧',
    "mistral": '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]'
    '[/AVAILABLE_TOOLS][INST] Q[/INST]⟦[TOOL_CALLS] [{"name": "look", "arguments": {"at": "sky", "n": 2}, "id": "abcdefgh1"}]'
    '</s>⟧[TOOL_RESULTS] {"content": blue, "call_id": "abcdefgh1"}[/TOOL_RESULTS]⟦ A</s>⟧',
    "glm": "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}\n</tools>\n\nFor each function call, '
    "output the function name and arguments within the following XML format:\n<tool_call>{function-name}\n"
    "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n<arg_key>{arg-key-2}</arg_key>\n"
    "<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call><|user|>\nQ<|assistant|>⟦\n<think></think>\n<tool_call>look\n"
    "<arg_key>at</arg_key>\n<arg_value>sky</arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    "<|observation|>⟧\n<tool_response>\nblue\n</tool_response><|assistant|>⟦\n<think></think>\nA<|user|>⟧",
}
DEEPSEEK_CALLS = (
    "<s><｜User｜>Q<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
    '{"at": "sky", "n": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>wait\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>blue"
    "<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>done<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦A<｜end▁of▁sentence｜>⟧"
)
THOUGHT = {
    "qwen3": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nA<|im_end|>⟧\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nA<|im_end|>⟧\n",
    "deepseek": "<s><｜User｜>Q<｜Assistant｜>⟦<think>\nhm\n</think>\n\nA<｜end▁of▁sentence｜>⟧",
    "glm": "[gMASK]<sop><|user|>\nQ<|assistant|>⟦\n<think>hm</think>\nA<|user|>⟧",
}
Q, A, R, B = Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B")


def family_encoder(name: str, **settings: Any) -> Encoder:
    special = ("<s>", "</s>", *MARKERS.get(name, ()))
    tokenizer = byte_level(special=special, bos_token="<s>", eos_token="</s>")
    return Encoder(tokenizer, builtin_template(name, tokenizer), now=NOW, **settings)


def shown(made: Encoder, conversation: Conversation) -> str:
    """The example as text, its targets between ⟦ and ⟧; its tokens compared with transformers'."""
    example = made.encode(conversation)
    theirs = made.tokenizer.apply_chat_template(
        conversation.to_dicts(), tools=list(conversation.tools) or None, chat_template=made.template.source
    )
    assert example.input_ids.tolist() == theirs["input_ids"]
    ids, trained, text = example.input_ids, example.loss_mask, ""
    borders = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        piece = made.tokenizer.backend_tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False)
        text += f"⟦{piece}⟧" if trained[start] else piece
    return text


def test_every_built_in_template_is_here():
    assert set(BUILTIN) == {*PLAIN, "plain"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_question_and_its_answer(name: str):
    assert shown(family_encoder(name), Conversation((Q, A))) == PLAIN[name]


@pytest.mark.parametrize("name", LONG)
def test_a_system_text_and_several_turns(name: str):
    conversation = Conversation((Message("system", "S"), Q, A, R, B))
    assert shown(family_encoder(name), conversation) == LONG[name]


@pytest.mark.parametrize("name", TOOLS)
def test_tools_calls_and_results(name: str):
    called = Message("assistant", "", tool_calls=(CALL,))
    conversation = Conversation((Q, called, Message("tool", "blue", tool_call_id="abcdefgh1"), A), (TOOL,))
    assert shown(family_encoder(name), conversation) == TOOLS[name]


def test_deepseek_writes_several_calls_and_results_together():
    called = Message("assistant", "", tool_calls=(CALL, AGAIN))
    conversation = Conversation((Q, called, Message("tool", "blue"), Message("tool", "done"), A))
    assert shown(family_encoder("deepseek"), conversation) == DEEPSEEK_CALLS


@pytest.mark.parametrize("name", THOUGHT)
@pytest.mark.parametrize("tagged", [False, True])
def test_thoughts(name: str, tagged: bool):
    answer = Message("assistant", "<think>\nhm\n</think>\n\nA") if tagged else Message("assistant", "A", reasoning="hm")
    assert shown(family_encoder(name), Conversation((Q, answer))) == THOUGHT[name]


@pytest.mark.parametrize("name", PLAIN)
def test_an_answer_follows_the_generation_prompt(name: str):
    made = family_encoder(name)
    source = made.template.source
    whole = made.tokenizer.apply_chat_template(Conversation((Q, A)).to_dicts(), chat_template=source, tokenize=False)
    prompt = made.tokenizer.apply_chat_template(
        Conversation((Q,)).to_dicts(), chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert prompt == PLAIN[name].partition("⟦")[0] and whole.startswith(prompt)


@pytest.mark.parametrize("name", ["llama2", "gemma", "phi", "phi4", "zephyr", "vicuna"])
def test_what_a_family_cannot_say_is_refused(name: str):
    made = family_encoder(name)
    called = Message("assistant", "", tool_calls=(CALL,))
    for conversation in (
        Conversation((Q, A), (TOOL,)),
        Conversation((Q, called)),
        Conversation((Q, called, Message("tool", "blue"), A)),
        Conversation((Q, Message("assistant", "A", reasoning="hm"))),
    ):
        with pytest.raises(Refused, match=f"template_(drops_content|refused).*{name}"):
            made.encode(conversation)


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral"])
def test_turns_that_do_not_alternate_are_refused_where_the_family_refuses_them(name: str):
    with pytest.raises(Refused, match=r"template_refused.*by turns"):
        family_encoder(name).encode(Conversation((Q, R, A)))


def test_llama3_takes_one_call_a_turn_and_mistral_wants_ids():
    with pytest.raises(Refused, match="one tool call a turn"):
        family_encoder("llama3").encode(Conversation((Q, Message("assistant", "", tool_calls=(CALL, AGAIN)))))
    nameless = {key: value for key, value in CALL.items() if key != "id"}
    with pytest.raises(Refused, match="nine letters"):
        family_encoder("mistral").encode(Conversation((Q, Message("assistant", "", tool_calls=(nameless,)))))
