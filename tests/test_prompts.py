"""Templates and masks, token by token."""

import copy

import pytest

from ultramed.core.errors import ConfigError
from ultramed.data.messages import as_instruction, question_prompt
from ultramed.lm.parsing import Parsed, parse
from ultramed.lm.templates import RELEASED, TEMPLATES, role_header
from ultramed.lm.tokens import TemplateError, encode_rows, labels, lint, preview

ROW = {
    "prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Which organ?\nA. eye\nB. ear"}],
    "completion": [{"role": "assistant", "content": "eye (A)"}],
}
QUESTION = {
    "id": "q",
    "source": "s",
    "question": "Which organ?",
    "context": None,
    "options": {"A": "eye", "B": "ear"},
    "gold": "A",
    "dataset": "d",
    "subset": "x",
    "meta": {},
}


def encode_row(row: dict, tokenizer, template, max_length: int) -> dict | None:
    return encode_rows([row], tokenizer, template, max_length)[0]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != RELEASED])
def test_exactly_the_answer_and_its_end_token_are_trained(tokenizer, name):
    row = encode_row(ROW, tokenizer, TEMPLATES[name], 256)
    wanted = labels(row["input_ids"], row["prompt_length"])
    trained = [t for t, label in zip(row["input_ids"], wanted, strict=True) if label != -100]
    assert tokenizer.decode(trained) == "eye (A)<|im_end|>"
    assert trained[-1] == tokenizer.eos_token_id
    prompt = tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    assert prompt == TEMPLATES[name].render(ROW["prompt"], tokenizer)
    lint(row["input_ids"], row["prompt_length"], tokenizer)


def test_chat_text_in_full(tokenizer):
    row = encode_row(ROW, tokenizer, TEMPLATES["chat"], 256)
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nWhich organ?\nA. eye\nB. ear<|im_end|>\n"
        "<|im_start|>assistant\neye (A)<|im_end|>"
    )


def test_alpaca_and_medalpaca_texts(tokenizer):
    alpaca = TEMPLATES["alpaca"].render(ROW["prompt"], tokenizer)
    assert alpaca.startswith("Below is an instruction that describes a task, paired with an input")
    assert alpaca.endswith("### Instruction:\nAnswer.\n\n### Input:\nWhich organ?\nA. eye\nB. ear\n\n### Response:")
    assert TEMPLATES["medalpaca"].render(ROW["prompt"], tokenizer) == alpaca + "\n"
    alone = [{"role": "user", "content": "Say hello."}]
    assert "### Input" not in TEMPLATES["alpaca"].render(alone, tokenizer)
    assert TEMPLATES["medalpaca"].render(alone, tokenizer).endswith("Say hello.\n\n### Input:\n\n\n### Response:\n")


def test_train_on_inputs_trains_every_token(tokenizer):
    row = encode_row(ROW, tokenizer, TEMPLATES["medalpaca"], 256)
    assert labels(row["input_ids"], row["prompt_length"], train_on_inputs=True) == row["input_ids"]


def test_truncation_cuts_the_end_and_says_so(tokenizer):
    whole = encode_row(ROW, tokenizer, TEMPLATES["chat"], 256)
    prompt = whole["prompt_length"]
    cut = encode_row(ROW, tokenizer, TEMPLATES["chat"], prompt + 1)
    assert cut["truncated"]
    assert cut["input_ids"] == whole["input_ids"][: prompt + 1]
    assert encode_row(ROW, tokenizer, TEMPLATES["chat"], prompt) is None
    assert encode_row(ROW, tokenizer, TEMPLATES["chat"], len(whole["input_ids"])) == whole, "what just fits is not cut"
    assert not whole["truncated"]


def test_rows_are_tokenised_together_as_alone(tokenizer):
    rows = [{**ROW, "completion": [{"role": "assistant", "content": text}]} for text in ("eye (A)", "", "ear (B)" * 90)]
    for limit in (40, 256):
        alone = [encode_row(row, tokenizer, TEMPLATES["chat"], limit) for row in rows]
        assert encode_rows(rows, tokenizer, TEMPLATES["chat"], limit) == alone
        assert [row["truncated"] for row in alone] == [limit == 40, False, True]
    with pytest.raises(TemplateError, match="doubled"):
        encode_rows([{**ROW, "completion": ROW["completion"]}], tokenizer, TEMPLATES[RELEASED], 256, checked=True)


def test_a_tokenizer_that_adds_tokens_adds_none_between_prompt_and_completion(tokenizer):
    """Llama's tokenizer begins every text with BOS; the template says where it stands, nobody else."""
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    assert len(adding("eye")["input_ids"]) == len(tokenizer("eye")["input_ids"]) + 1
    assert encode_row(ROW, adding, TEMPLATES["chat"], 256) == encode_row(ROW, tokenizer, TEMPLATES["chat"], 256)
    plain, begun = (encode_row(ROW, tok, TEMPLATES["medalpaca"], 256) for tok in (tokenizer, adding))
    assert begun["input_ids"] == [tokenizer.bos_token_id, *plain["input_ids"]], "a plain text begins as its tokenizer says"
    assert begun["prompt_length"] == plain["prompt_length"] + 1


@pytest.mark.parametrize("refuses", [True, False])
def test_a_chat_template_without_a_system_turn_gets_it_in_the_users(tokenizer, refuses):
    """Gemma's raises, others drop the turn without a word."""
    own = copy.deepcopy(tokenizer)
    raising = "{{ raise_exception('System role not supported') }}" if refuses else ""
    own.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}" + raising + "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    )
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which organ?"}]
    text = TEMPLATES["chat"].render(asked, own)
    assert text == "<|im_start|>user\nBe brief.\n\nWhich organ?<|im_end|>\n<|im_start|>model\n"
    with pytest.raises(ConfigError, match="does not take"):
        TEMPLATES["chat"].render([asked[0]], own)


def test_fingerprints_tell_templates_apart(tokenizer):
    assert len({t.fingerprint(tokenizer) for t in TEMPLATES.values()}) == len(TEMPLATES)


def _lint_text(tokenizer, prompt: str, completion: str, given: bool = False):
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion))
    lint(a + b, len(a), tokenizer, texts=[prompt, completion] if given else None)


def test_lint_accepts_a_good_row(tokenizer):
    _lint_text(tokenizer, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello<|im_end|>")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("<|im_start|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello<|im_end|>", "twice in a row"),
        ("<|im_start|>assistant\n<|im_start|>assistant\n", "hello<|im_end|>", "doubled role header"),
        ("<|im_start|>assistant\n", "hello<|im_end|>\n<|im_start|>assistant\n", "dangling"),
        ("<|im_start|>assistant\n", "hello", "does not end with"),
        ("<|im_start|>assistant\n", "", "0 of"),
    ],
)
def test_lint_refuses_malformed_rows(tokenizer, prompt, completion, why, given):
    with pytest.raises(TemplateError, match=why):
        _lint_text(tokenizer, prompt, completion, given)


def test_ultramedicals_released_template_is_refused(tokenizer):
    """It appends an assistant header to every rendering: prompt and completion are rendered apart, so it comes twice."""
    header = role_header(tokenizer)
    prompt = "<|im_start|>user\nhi<|im_end|>\n" + header
    with pytest.raises(TemplateError, match="doubled role header"):
        _lint_text(tokenizer, prompt, header + "hello<|im_end|>\n" + header)


def test_question_rows_become_instructions_in_both_forms(tokenizer):
    first = as_instruction(QUESTION, "letter_first")
    assert first["completion"][0]["content"] == "A: eye"
    assert as_instruction(QUESTION, "content_first")["completion"][0]["content"] == "eye (A)"
    assert question_prompt(QUESTION, "letter_first") == first["prompt"]
    assert first["prompt"][1]["content"] == "Which organ?\nA. eye\nB. ear"
    made = as_instruction(QUESTION, "medalpaca")
    assert [turn["content"] for turn in made["prompt"]] == [
        "Answer this multiple choice question.",
        "Which organ?\nA: eye\nB: ear",
    ]
    assert made["completion"][0]["content"] == "A: eye"


def test_a_reasoned_answer_gives_reasons_and_a_last_line(tokenizer):
    row = {**QUESTION, "context": "An abstract.", "meta": {"rationale": "Sight is of the eye."}}
    made = as_instruction(row, "reasoned")
    assert made["completion"][0]["content"] == "Sight is of the eye.\nAnswer: eye (A)"
    assert as_instruction(QUESTION, "reasoned")["completion"][0]["content"] == "Answer: eye (A)"
    (turn,) = made["prompt"]
    assert turn["role"] == "user", "UltraMedical's format has no system turn"
    assert turn["content"].startswith("An abstract.\n\nWhich organ?\n\nA. eye\nB. ear\n\nThink step by step.")
    assert parse(made["completion"][0]["content"], QUESTION["options"], "reasoned") == Parsed("A", "final line", True)


def test_preview_marks_trained_tokens_and_escapes(tokenizer):
    row = {**ROW, "prompt": [{"role": "user", "content": "<script>"}]}
    made = encode_row(row, tokenizer, TEMPLATES["chat"], 256)
    shown = preview([made], tokenizer).data
    assert "<script>" not in shown
    trained = len(made["input_ids"]) - made["prompt_length"]
    assert shown.count("#9ecae1") == trained
    assert f"{trained} trained on (blue)" in shown
    assert "&lt;" in shown
