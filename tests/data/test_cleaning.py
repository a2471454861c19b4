import json
import pickle
import time

import pytest

from dstune.cli.main import main
from dstune.config.schema import Source
from dstune.data.cleaning import STEPS, Cleaner
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats import to_conversations
from dstune.data.instruction import apart
from dstune.errors import ConfigError


def chat(*said):
    roles = ("user", "assistant") * len(said)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, said, strict=False)))


def answer_after(step, answer, question="Tell me."):
    return Cleaner([step]).clean(chat(question, answer)).conversation.messages[1].content


def dropped(step, answer, question="Tell me."):
    """The reason's detail, or None where the conversation stays."""
    try:
        assert Cleaner([step]).clean(chat(question, answer)).changed == ()
    except Refused as refused:
        name = step if isinstance(step, str) else next(iter(step))
        assert refused.reason == f"clean_{name}"
        return refused.detail
    return None


class TestCleaner:
    def test_no_steps_change_nothing(self):
        conversation = chat(" a\u0000 ", "As an AI language model, I cannot.")
        assert Cleaner([]).clean(conversation).conversation is conversation
        assert not Cleaner([])

    def test_steps_run_in_the_users_order_and_name_what_changed(self):
        spaces = chat("a", "x &nbsp; y")
        html_first = Cleaner(["html", "whitespace"]).clean(spaces)
        assert html_first.conversation.messages[1].content == "x y"
        assert html_first.changed == ("html", "whitespace")
        other = Cleaner(["whitespace", "html"]).clean(spaces)
        assert other.conversation.messages[1].content == "x   y"
        assert other.changed == ("html",)

    def test_all_mistakes_at_once_with_the_nearest_names(self):
        steps = [
            "unicod",
            {"whitespace": {"max_blank_line": 1}},
            {"unicode": {"form": "NFD"}},
            {"html": None, "length": None},
            {"refusals": {"patterns": ["("]}},
            {"language": {}},
            {"language": {"keep": ["english"]}},
            {"ratio": 3},
            {"length": {"min_answer": 9, "max_answer": 3}},
        ]
        with pytest.raises(ConfigError) as caught:
            Cleaner(steps)
        problems = [str(problem) for problem in caught.value.problems]
        assert len(problems) == len(steps)
        for number, (problem, words) in enumerate(
            zip(
                problems,
                ("'unicode'", "'max_blank_lines'", "NFC", "2 keys", "'('", "keep", "english", "3", "minimum"),
                strict=True,
            )
        ):
            assert f"data.clean[{number}]" in problem and words in problem

    def test_every_step_is_documented_and_travels(self):
        needed = {"language": {"keep": ["en"]}}
        cleaner = pickle.loads(pickle.dumps(Cleaner([{name: needed.get(name)} for name in STEPS])))
        assert [next(iter(step)) for step in cleaner.described()] == list(STEPS)
        for step in STEPS.values():
            schema = step.model_json_schema()
            assert schema["description"]
            assert all("description" in setting for setting in schema["properties"].values())

    def test_the_command_line_lists_every_step_and_setting(self, capsys):
        assert main(["schema", "--cleaning"]) == 0
        shown = capsys.readouterr().out
        assert main(["schema", "--cleaning", "--json"]) == 0
        steps = json.loads(capsys.readouterr().out)
        for name, step in STEPS.items():
            assert name in shown and all(setting in shown for setting in step.model_fields)
            assert steps[name]["properties"].keys() == step.model_fields.keys()

    def test_an_instruction_stays_apart_from_its_input(self):
        record = {"instruction": " Sum  up: \u200b", "input": "  One &amp; two.\r\n\n\n\n\nThree.  ", "output": " ok "}
        [conversation] = to_conversations(record, Source(path="x"))
        cleaned = Cleaner(["control_characters", "html", "whitespace"]).clean(conversation).conversation
        question = apart(cleaned).messages[0]
        assert (question.content, question.input) == ("Sum up:", "One & two.\n\n\nThree.")

    def test_settings_that_decide_are_described(self):
        assert Cleaner([{"unicode": {"form": "NFKC"}}]).described() == [{"unicode": {"form": "NFKC"}}]
        [language] = Cleaner([{"language": {"keep": ["en"]}}]).described()
        assert language["language"]["keep"] == ["en"] and "py3langid" in language["language"]["detector"]


class TestUnicode:
    def test_letters_and_accents_are_joined(self):
        assert answer_after("unicode", "cafe\u0301") == "caf\u00e9"

    @pytest.mark.parametrize("text", ["x² + ½ … ﬁ ＡＢＣ，", "```\ncafe\u0301\n```", "plain"])
    def test_what_means_something_stays(self, text):
        assert answer_after("unicode", text) == text

    def test_nfkc_on_request(self):
        assert answer_after({"unicode": {"form": "NFKC"}}, "ＡＢＣ x²") == "ABC x2"


class TestWhitespace:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("  Hello  world. \n", "Hello world."),
            ("a\r\nb\rc", "a\nb\nc"),
            ("a\n\n\n\n\n\nb", "a\n\n\nb"),
            ("a \u00a0 b", "a b"),
            ("One.  Two.   \nThree.", "One. Two.\nThree."),
            ("\n\n  x", "x"),
            ("", ""),
            (" \n ", ""),
        ],
    )
    def test_blanks_that_say_nothing_go(self, before, after):
        assert answer_after("whitespace", before) == after

    @pytest.mark.parametrize(
        "text",
        [
            "```python\nx  =  1\n\n\n\n\ny = 2   \n```",
            "    return x\n    # end",
            'fn f() {\n    code += "    let x";\n}',
            'x = "a   b"',
            'print("a  b");',
            "Run `ls  -l` there.",
            "def f():\n    if x:\n        return 1",
            "name    age   city\nAda     36    London",
            "| a   | b |\n|-----|---|",
            "a\tb\t\tc",
            "line one  \nline two",
            "- a\n    - b",
            "~~~\na  b\n~~~",
            "10\u00a0km",
        ],
    )
    def test_code_indentation_tables_and_markdown_stay(self, text):
        assert answer_after("whitespace", text) == text


class TestControlCharacters:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("\ufeffa\u0000b\u200bc\u00add", "abcd"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("a\u2028b\u000cc", "a\nb\nc"),
            ("safe\u202eevil\u2066", "safeevil"),
            ("don\x92t \x96 wait\x85", "don\u2019t \u2013 wait\u2026"),
            ("hidden\U000e0041\U000e0042", "hidden"),
        ],
    )
    def test_what_nobody_sees_goes(self, before, after):
        assert answer_after("control_characters", before) == after

    @pytest.mark.parametrize(
        "text",
        [
            "a\tb\nc",
            "👨‍👩‍👧",
            "می‌خواهم",
            "क्‍ष",
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "\u2066"[:0] + "שלום\u200f!",
            "½ € 中文 😀",
        ],
    )
    def test_what_joins_letters_and_emoji_stays(self, text):
        assert answer_after("control_characters", text) == text


class TestHtml:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("Tom &amp; Jerry &quot;at&quot; &#39;home&#39; &#x41;", "Tom & Jerry \"at\" 'home' A"),
            ("One<br>two<br/>three", "One\ntwo\nthree"),
            ("<p>One.</p><p>Two.</p>", "\nOne.\nTwo."),
            ("a <b>bold</b> and <i>light</i> word", "a bold and light word"),
            ('<span style="color: red">red</span> <a href="https://x.org/?a=1&b=2">here</a>', "red here"),
            ("&lt;b&gt; and &amp;amp;", "<b> and &amp;"),
            ("a&nbsp;b", "a b"),
        ],
    )
    def test_leftovers_of_pages_go(self, before, after):
        assert answer_after("html", before) == after

    @pytest.mark.parametrize(
        "text",
        [
            "if a < b and c > d then",
            "a <b and c> d",
            "List<String> and Map<i, b> and Vec<u>",
            "#include <iostream>\nvector<p> x;",
            "https://x.org/?a=1&copy=2&lt=3",
            "AT&T; R&D; &unknown; &#0; &#xD800; &#99999999;",
            "```\n<br>&amp;\n```",
            "Write `<br>` or `&amp;` there.",
            "<think>Hm.</think>\n<answer>4</answer>",
            "<note><to>Ada</to></note>",
            "H<sub>2</sub>O and x<sup>2</sup>",
        ],
    )
    def test_comparisons_code_and_other_tags_stay(self, text):
        assert answer_after("html", text) == text

    def test_a_conversation_about_markup_stays(self):
        page = "<div><p>Hello &amp; welcome</p></div>"
        assert answer_after("html", page, question="Write some HTML.") == page
        assert answer_after("html", page, question="写一个网页") == page


class TestRefusals:
    @pytest.mark.parametrize(
        "answer",
        [
            "As an AI language model, I don't have personal opinions.",
            "As an AI, I cannot feel.",
            "I'm sorry, but as an AI language model I have no access to that.",
            "I am sorry, but I cannot assist with that.",
            "I’m sorry, I can’t help with that request.",
            "I apologize, but I am unable to provide that information.",
            "Unfortunately, I am an AI language model and cannot see.",
            "I cannot fulfill your request.",
            "很抱歉，我无法帮助您预订机票。",
            "对不起，作为一个人工智能助手，我不能回答这个问题。",
            "作为一个AI语言模型，我没有个人感受。",
            "由于我是一个人工智能语言模型，我无法获取实时信息。",
        ],
    )
    def test_boilerplate_is_dropped(self, answer):
        assert dropped("refusals", answer)

    @pytest.mark.parametrize(
        "answer",
        [
            "I'm sorry, but I'm unable to come into work today.",
            "I am sorry the hotel has no room, how about another one?",
            "I'm sorry to hear that. Here is what you can do.",
            "I can't help but be drawn to her.",
            "Unfortunately, I cannot determine the angle given only two sides.",
            "I cannot recommend this film enough!",
            "As an AI assistant developed by ACME, I got the name Bob.",
            "As an AI assistant, I would help the customer in these steps:",
            "As a teacher, I cannot accept this.",
            "She wrote: I'm sorry, but as an AI language model I cannot.",
            "抱歉，我是小明，由 ACME 开发，旨在为用户提供帮助。",
            "抱歉，您没有提供文本。",
            "作为一个人工智能助手，我会收集用户的反馈。",
            "",
        ],
    )
    def test_other_answers_stay(self, answer):
        assert dropped("refusals", answer) is None

    def test_only_the_final_answer_counts(self):
        refusal = "I'm sorry, but I cannot assist with that."
        Cleaner(["refusals"]).clean(chat("a", refusal, "b", "Here you are."))
        with pytest.raises(Refused):
            Cleaner(["refusals"]).clean(chat("a", "Here you are.", "b", refusal))

    def test_patterns_are_added_or_stand_alone(self):
        step = {"refusals": {"patterns": ["je suis désolé"], "builtin": False}}
        assert dropped(step, "Je suis désolé, mais non.")
        assert dropped(step, "I cannot fulfill that.") is None


class TestLengthAndRatio:
    def test_empty_answers_are_dropped_by_default(self):
        assert dropped("length", " \n")
        assert dropped("length", "4") is None

    def test_bounds_in_characters_and_words(self):
        assert dropped({"length": {"max_answer": 3}}, "four")
        assert dropped({"length": {"min_question": 9}}, "a", question="short")
        words = {"length": {"unit": "words", "min_answer": 3, "max_answer": 4}}
        assert dropped(words, "two words")
        assert dropped(words, "these are three") is None
        assert dropped(words, "三个字") is None
        assert dropped(words, "这是五个字")
        assert dropped({"length": {"unit": "words"}}, "😀") is None
        assert dropped({"length": {"unit": "words"}}, " ")

    def test_turns_that_only_call_tools_have_no_answer_to_measure(self):
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        calling = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(call,))))
        assert Cleaner(["length", "placeholders", "ratio"]).clean(calling).conversation is calling

    def test_answers_out_of_proportion(self):
        assert dropped({"ratio": {"max_answer": 2}}, "a" * 11, question="b" * 5)
        assert dropped({"ratio": {"min_answer": 0.5}}, "aa", question="b" * 5)
        assert dropped({"ratio": {"max_answer": 3, "min_answer": 0.5}}, "a" * 11, question="b" * 5) is None

    def test_an_answer_that_repeats_itself(self):
        assert dropped("ratio", "I will say it again and again until the end. " * 30)
        assert dropped("ratio", "我会一遍又一遍地说同样的话直到最后。" * 30)
        assert dropped("ratio", " ".join(f"word{number}" for number in range(300))) is None
        assert dropped("ratio", "la la la " * 9) is None
        assert dropped("ratio", "```\n" + "0 1 0 1 0 1 0 1\n" * 100 + "```") is None
        assert dropped({"ratio": {"max_repetition": 1}}, "I will say it again and again until the end. " * 30) is None


class TestLanguage:
    ENGLISH = "The quick brown fox jumps over the lazy dog while the sun is setting behind the hills of the old town."
    GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während die Sonne hinter den Hügeln der alten Stadt untergeht."
    CHINESE = "机器学习是人工智能的一个分支，它使用算法让计算机从数据中学习并改进自身的性能。"

    def test_other_languages_are_dropped_on_either_side(self):
        step = {"language": {"keep": ["en"]}}
        assert dropped(step, self.ENGLISH) is None
        assert "likely in de" in dropped(step, self.GERMAN)
        assert "likely in zh" in dropped(step, self.CHINESE)
        assert dropped(step, self.ENGLISH, question=self.GERMAN)
        assert dropped({"language": {"keep": ["en", "de", "zh"]}}, self.GERMAN) is None

    @pytest.mark.parametrize(
        "text",
        [
            "Bonjour!",
            "3 + 4 = 7",
            "def f(x):\n    return {k: v for k, v in x.items() if k != '_'}\n\nprint(f({'a': 1}), f([]))",
            "```\nDer schnelle braune Fuchs springt über den faulen Hund und die Sonne geht unter\n```",
        ],
    )
    def test_short_texts_and_code_have_no_language(self, text):
        assert dropped({"language": {"keep": ["zh"]}}, text) is None


class TestPlaceholders:
    @pytest.mark.parametrize(
        "answer",
        ["I am {{name}}.", "I am {{ author }}.", "", " ", "<nooutput>", "<No output>", "Use <insert your name>."],
    )
    def test_blanks_are_dropped(self, answer):
        assert dropped("placeholders", answer)

    @pytest.mark.parametrize(
        "answer",
        [
            "$\\frac{{a}}{{b}}$ and x^{{n}} and {{{a}}}",
            "```jinja\nHello {{ name }}\n```",
            "Dear [Recipient], … Sincerely, [Your Name]",
            "{{ 1 + 2 }} and {}",
            "None",
            "a <b> c",
            "see [name](https://x.org)",
        ],
    )
    def test_code_formulas_and_forms_stay(self, answer):
        assert dropped("placeholders", answer) is None

    def test_forms_on_request(self):
        step = {"placeholders": {"kinds": ["brackets"]}}
        assert dropped(step, "Sincerely, [Your Name]")
        assert dropped(step, "此致，[你的名字]")
        assert dropped(step, "see [name](https://x.org), [1], [x for x in y]") is None

    def test_values_fill_blanks_in_every_turn(self):
        step = {"placeholders": {"values": {"name": "Ada", "author": "ACME"}}}
        cleaned = Cleaner([step]).clean(chat("Are you {{name}}?", "Yes, {{ name }} by {{author}}."))
        assert [turn.content for turn in cleaned.conversation.messages] == ["Are you Ada?", "Yes, Ada by ACME."]
        assert cleaned.changed == ("placeholders",)
        assert dropped(step, "{{name}} and {{other}}")

    def test_flagged_on_request(self):
        cleaned = Cleaner([{"placeholders": {"action": "flag"}}]).clean(chat("a", "{{name}}"))
        assert cleaned.flagged == ("placeholders",) and cleaned.changed == ()


# Keys are put together here, so that no scanner takes this file for a leak.
SK = "sk-" + "a1B2c3D4e5F6g7H8i9J0k1L2"
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
AWS = "AKIA" + "IOSFODNN7EXAMPL3"
PRIVATE = "-----BEGIN RSA PRIVATE " + "KEY-----\n" + "MIIEpAIBAAKCAQEA7b\n" * 9 + "-----END RSA PRIVATE " + "KEY-----"


class TestPersonalData:
    MASK = {"personal_data": {"action": "mask"}}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("text", "masked"),
        [
            ("Write to ada.lovelace+math@gmail.com.", "Write to [EMAIL]."),
            ("邮箱是ada@qq.com。", "邮箱是[EMAIL]。"),
            ("Call +49 30 1234567 now", "Call [PHONE] now"),
            ("Call (415) 555-2671 or 415-555-2671!", "Call [PHONE] or [PHONE]!"),
            ("电话是010-63370491,手机13810105454。", "电话是[PHONE],手机[PHONE]。"),
            ("Pay with 4539 1488 0343 6467.", "Pay with [CREDIT_CARD]."),
            ("Card 378282246310005", "Card [CREDIT_CARD]"),
            ("4539-1488-0343-6467 12/27 123", "[CREDIT_CARD] 12/27 123"),
            ("BE68 5390 0754 7034 BIC KREDBEBB", "[IBAN] BIC KREDBEBB"),
            ("tel=+49 (0)30 1234567, mobile 415 555 2671", "tel=[PHONE], mobile [PHONE]"),
            ("ada@gmail.com: hello", "[EMAIL]: hello"),
            ("IBAN DE89 3704 0044 0532 0130 00, thanks", "IBAN [IBAN], thanks"),
            ("GB82WEST12345698765432", "[IBAN]"),
            ("from 93.184.216.34 and 2606:2800:220:1:248:1893:25c8:1946", "from [IP] and [IP]"),
            (f"key {SK} and {GITHUB} and {AWS}", "key [API_KEY] and [API_KEY] and [API_KEY]"),
            ("api_key = 'a1B2c3D4e5F6g7H8i9J0k1'", "api_key = '[API_KEY]'"),
            ('OPENAI_API_KEY="a1B2c3D4e5F6g7H8i9J0k1"', 'OPENAI_API_KEY="[API_KEY]"'),
            (f"Mine:\n{PRIVATE}\nEnd", "Mine:\n[PRIVATE_KEY]\nEnd"),
        ],
    )
    def test_what_is_masked(self, text, masked):
        assert answer_after(self.MASK, text) == masked

    @pytest.mark.parametrize(
        "text",
        [
            "user@example.com, me@mail.example.org, you@yourdomain.com, name@localhost",
            "git clone git@github.com:owner/repository.git; scp file me@host.com:/tmp",
            "sizes 415 555 2671 and 4539 1488 0343 6467 1234",
            "y = x@w.T + a@self.weight",
            "@property and @app.route('/x')",
            "On 2024-01-31 at 12:30:45, 31.12.1999, 1999-2003",
            "ISBN 978-3-16-148410-0 and 9780306406157",
            "version 1.2.3.4, v10.200.30.40 and 192.168.0.1, 127.0.0.1, 10.0.0.255",
            "3.14159265358979, 1234567890123456, 1,234,567,890",
            "2 + 4155552671 = 4155552673; x=+12345678901",
            "The order 20231015123456 of 12345678901",
            "ratio 2:1:3 and 10:00:00, std::vector, a::b",
            "years 1978-1981 1982-1987 1988-1992",
            "ISIN DE0006602006, DE12 3456 7890",
            "sk-learn, sk-xxxxxxxxxxxxxxxxxxxxxxxx, token = 'your_token_goes_here_please'",
            "pi = 3.1415926535 8979323846 2643383279",
            "4111111111111112",
            "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqh\n-----END PUBLIC KEY-----",
        ],
    )
    def test_what_only_looks_like_it_stays(self, text):
        assert answer_after(self.MASK, text) == text

    def test_flagged_by_kind_and_left_as_it_is_by_default(self):
        conversation = chat("I am ada@gmail.com", f"Your key is {SK}.")
        cleaned = Cleaner(["personal_data"]).clean(conversation)
        assert cleaned.conversation is conversation
        assert cleaned.flagged == ("personal_data_api_key", "personal_data_email")

    def test_dropped_on_request_without_saying_what(self):
        with pytest.raises(Refused) as caught:
            Cleaner([{"personal_data": {"action": "drop", "kinds": ["email"]}}]).clean(chat("ada@gmail.com", "x"))
        assert "email" in caught.value.detail and "ada" not in caught.value.detail
        assert dropped({"personal_data": {"action": "drop", "kinds": ["iban"]}}, "ada@gmail.com") is None

    def test_calls_reasoning_and_tools_are_masked_and_nothing_else_of_them_changes(self):
        call = {
            "type": "function",
            "function": {"name": "mail", "arguments": {"to": ["ada@gmail.com"], "n": 1, "x": None}},
        }
        tool = {"type": "function", "function": {"name": "mail", "description": "Ask root@acme.org", "parameters": {}}}
        turns = (Message("user", "a"), Message("assistant", "", tool_calls=(call,), reasoning="To ada@gmail.com"))
        cleaned = Cleaner([self.MASK]).clean(Conversation(turns, (tool,)))
        made = cleaned.conversation
        assert made.messages[1].tool_calls[0]["function"]["arguments"] == {"to": ["[EMAIL]"], "n": 1, "x": None}
        assert made.messages[1].reasoning == "To [EMAIL]"
        assert made.tools[0]["function"]["description"] == "Ask [EMAIL]"
        assert call["function"]["arguments"]["to"] == ["ada@gmail.com"]
        assert cleaned.changed == ("personal_data",)


HOSTILE = [
    " " * 200_000,
    "a" * 200_000,
    "a." * 100_000,
    "1 " * 100_000,
    "1-" * 100_000,
    "<b " * 60_000,
    "&a" * 100_000,
    "{{a" * 60_000,
    "[your " * 40_000,
    "-----BEGIN PRIVATE KEY-----" * 8_000,
    "eyJ" * 60_000,
    "```\n" * 50_000,
    "ab:" * 60_000,
    "+1" * 100_000,
    "\u00a0 " * 100_000,
    "As an AI " * 20_000,
    "a@" * 100_000,
    "a" + "\u00a0" * 200_000 + "b",
    "a" + " " * 200_000 + "b",
    "a   " * 50_000 + "b",
    "a" * 100_000 + "   b" + "c " * 50_000 + "d",
    "=" * 200_000,
    "\n \n" * 60_000,
    "token='" * 30_000,
    "4539 1488 0343 6467 " * 10_000,
    "DE89 3704 " * 20_000,
    "ab@" + "a." * 100_000,
    "&amp;" * 40_000,
    "<b>" * 60_000,
    "\x1b[" * 100_000,
    "作为" * 100_000,
    "`" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].strip() or "blanks")
def test_no_text_takes_long(text):
    """200 kB in seconds at the very most, also on a busy machine: the time grows with the length, not with its square."""
    steps = [name for name in STEPS if name != "language"] + [{"language": {"keep": ["en"], "min_confidence": 1.0}}]
    start = time.process_time()
    for step in steps:
        try:
            Cleaner([step]).clean(chat("a", text))
        except Refused:
            continue
    assert time.process_time() - start < 5


@pytest.mark.shared
def test_real_identity_rows_are_filled_in_as_llama_factory_wants(shared_data):
    rows = json.loads((shared_data / "llama_factory/identity.json").read_text())
    step = {"placeholders": {"values": {"name": "Ada", "author": "ACME"}}}
    for row in rows:
        answer = answer_after(step, row["output"], question=row["instruction"])
        assert answer == row["output"].replace("{{name}}", "Ada").replace("{{author}}", "ACME")


@pytest.mark.shared
def test_real_rows_lose_nothing_but_boilerplate(shared_data):
    """Counted and read by eye: 22 refusals among 999 rows of alpaca, and no row that any other default drops."""
    rows = json.loads((shared_data / "llama_factory/alpaca_en_demo.json").read_text())
    steps = [name for name in STEPS if name not in ("language", "refusals")]
    cleaner, refusals = Cleaner([*steps, {"language": {"keep": ["en"]}}]), Cleaner(["refusals"])
    refused = 0
    for row in rows:
        conversation = chat(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
        assert cleaner.clean(conversation).conversation.messages[1].content.strip()
        try:
            refusals.clean(conversation)
        except Refused:
            refused += 1
    assert refused == 22
