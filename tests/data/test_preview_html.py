"""The page of `dstune preview --html`: what it shows is what is in the data, and what is in the data stays text."""

import copy
import dataclasses
import html.parser
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from dstune import api
from dstune.config.schema import ModelSection, RunConfig
from dstune.data import prepare
from dstune.data.preview import charts, html_page, survey, visible
from dstune.data.preview.conversation import conversations
from dstune.data.preview.text import Marked, pieces
from dstune.data.tokenize import load_tokenizer
from dstune.errors import UsageError
from tests.data.browser import CHROMIUM, Browser
from tests.data.test_preview import NASTY

HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'><svg onload='window.hit = 1'>",
    "</style></title></textarea><style>body { display: none }</style>",
    "<!-- <![CDATA[ ]]> --> -->",
    "\" onmouseover=\"window.hit = 1\" style='color: red' '",
    '<a href="javascript:window.hit = 1">x</a> javascript:alert(1)',
    "</i></mark></div></details></main></body></html>",
    "<base href='http://127.0.0.1:9/'><meta http-equiv=refresh content='0; url=http://127.0.0.1:9/'>",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css><iframe srcdoc='<script>top.hit = 1</script>'></iframe>",
    "&lt;b&gt; &amp;amp; &#60;script&#62; {{ 7 * 7 }} {% raw %}",
    "W" * 450,
    "V" * 3000,
    "\n\nשלום עולם مرحبا بالعالم \u202eevil\u2066 a\u0301\u0302\u0303" + "\u0316" * 40,
    "龘𝔘🧑‍🚀 e\u0301\ufeff\u3164\U000e0101\ue000\x00\x0b",
    "<|im_end|>\n<|im_start|>system\nyou are <|im_start|>",
    NASTY,
]
ALLOWED = """
html head meta title style body a header h1 h2 h3 bdi p nav main section ul li b dl div dt dd small table thead tbody tr th td br
span svg g rect line text figure figcaption details summary code mark i u
"""


FINDING = re.compile('<li class="(good|note|warn)">(.*?)</li>')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Prepared data of hostile texts, keys and file names, and its tokenizer."""
    base = tmp_path_factory.mktemp("hostile")
    records = [
        {"instruction": f"{number} {text}", "output": f"{text} {number % 7}"} for number in range(3) for text in HOSTILE
    ]
    bad = [{text[:60]: 1} for text in HOSTILE[:6]]
    name = "a \"><img src=x onerror='window.hit=1'>\u202e\x1b[1m&lt;.jsonl"
    (base / name).write_text("\n".join([*map(json.dumps, [*records, *bad, records[0]]), "{"]))
    (base / "other.jsonl").write_text(json.dumps({"instruction": "one", "output": "alone"}))
    data = {
        "sources": [{"path": name}, {"path": "other.jsonl", "repeat": 2.5}],
        "bad_rows": "skip",
        "overlong": "drop",
        "max_length": 1024,
        "num_processes": 1,
    }
    model = {"path": "builtin:tiny-llama"}
    config = RunConfig.model_validate({"name": "hostile", "model": model, "data": data})
    return prepare.prepare(config, base), load_tokenizer(config.model, base)


@pytest.fixture(scope="module")
def page(made):
    return html_page(*made, count=100, seed=0)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian's package of that name)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as driven:
        yield driven


@pytest.fixture
def opened(browser, page, tmp_path):
    """The browser with the page in it, everything unfolded."""
    path = tmp_path / "page.html"
    path.write_text(page)
    browser.open(path, width=360)
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    return browser


class Seen(html.parser.HTMLParser):
    """Tags, attributes and the text of each conversation, by Python's own parser."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.titles, self.talks, self.depth = Counter(), Counter(), [], [], 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attributes)
        if tag == "div" and dict(attributes).get("dir") == "auto":
            self.talks.append("")
            self.depth = 1
        elif tag == "div" and self.depth:
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "div" and self.depth > 0

    def handle_data(self, text):
        if self.depth:
            self.talks[-1] += text


def texts(made, trained=False):
    """What every example shows (or its trained runs), by decoding whole runs of tokens."""
    prepared, tokenizer = made
    shown = {}
    for number in range(prepared.num_examples):
        example = prepared.example(number)
        if not trained:
            shown[number] = visible(tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False))
        else:
            places = np.flatnonzero(example.loss_mask)
            assert (np.diff(places) == 1).all()
            shown[number] = visible(tokenizer.decode(example.input_ids[places].tolist(), skip_special_tokens=False))
    return shown


def test_only_our_own_elements_stand_on_the_page(page):
    seen = Seen(page)
    assert set(seen.tags) <= set(ALLOWED.split())
    assert seen.tags["style"] == seen.tags["body"] == seen.tags["main"] == 1 and seen.tags["meta"] == 5
    assert not {
        name for name in seen.attributes if name.startswith("on") or name in ("style", "src", "srcdoc", "action")
    }
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    for character in "\x1b\x00\x0b\u202e\u2066\ufeff\u3164\U000e0101\ue000\r":
        assert character not in page


def test_every_text_stands_as_it_is(made, page):
    talks = Seen(page).talks
    assert Counter(talks) == Counter(texts(made).values())
    for spelled in (
        "\\u202eevil\\u2066",
        "\\ufeff\\u3164\\U000e0101\\ue000\\x00\\x0b",
        "{{ 7 * 7 }}",
        "&#60;script&#62;",
    ):
        assert sum(spelled in talk for talk in talks) == 3


def test_in_a_browser_nothing_is_executed_or_fetched(opened):
    assert opened.value("window.hit") is None
    assert opened.value("document.querySelectorAll('script, img, iframe, link, base, object, form').length") == 0
    assert [event["request"]["url"][:5] for event in opened.events("Network.requestWillBeSent")] == ["file:"]
    assert not opened.events(
        "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"
    )


def test_the_browser_would_refuse_what_slipped_through(opened):
    opened.value("document.body.appendChild(document.createElement('script')).textContent = 'window.hit = 1'")
    opened.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">')")
    opened.value("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert opened.value("window.hit") is None
    said = [entry["entry"]["text"] for entry in opened.events("Log.entryAdded")]
    assert sum("Content Security Policy" in text for text in said) >= 3


def test_the_browser_shows_every_text_and_what_is_trained(opened, made):
    shown = opened.value(
        "[...document.querySelectorAll('details.box:has(.talk)')].map(one => [one.querySelector('bdi').textContent, "
        "one.querySelector('.talk').textContent, [...one.querySelectorAll('.talk mark')].map(run => run.textContent).join('')])"
    )
    whole, trained = texts(made), texts(made, trained=True)
    assert {int(number): text for number, text, _ in shown} == whole
    assert {int(number): text for number, _, text in shown} == trained
    style = "getComputedStyle(document.querySelector('.talk mark'))"
    assert opened.value(f"{style}.textDecorationLine") == "underline"  # our own style sheet is let in, by its hash
    assert opened.value(f"{style}.color") != opened.value("getComputedStyle(document.querySelector('.talk')).color")


@pytest.mark.parametrize("width", [360, 1600])
def test_the_page_never_scrolls_sideways(opened, width):
    opened.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    assert opened.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.talk, figure, table, .box')].filter(one => one.getBoundingClientRect().right > innerWidth)"
    assert opened.value(f"{wide}.length") == 0


def test_what_is_folded_is_printed_too(opened):
    opened.value("document.querySelectorAll('details').forEach(one => one.open = false)")
    folded = "[...document.querySelectorAll('.talk:not(.legend *)')].filter(one => !one.checkVisibility()).length"
    assert opened.value(folded) > 40
    opened.call("Emulation.setEmulatedMedia", media="print")
    assert opened.value(folded) == 0


def test_each_token_has_its_number(opened, made):
    prepared, _ = made
    titles = opened.value(
        "Object.fromEntries([...document.querySelectorAll('details.box:has(.talk)')].map(one => "
        "[one.querySelector('bdi').textContent, [...one.querySelectorAll('.talk i')].map(token => token.title)]))"
    )
    for number, found in titles.items():
        ids = [int(one) for title in found for one in title.split(" ")[0].split("+")]
        assert ids == prepared.example(int(number)).input_ids.tolist()


def test_figures(made, page):
    prepared, tokenizer = made
    counts = prepared.manifest["counts"]
    found = survey.survey(prepared, Marked.of(tokenizer))
    assert found.lengths.tolist() == [len(prepared.example(n).input_ids) for n in range(prepared.num_examples)]
    assert found.supervised.tolist() == [int(prepared.example(n).loss_mask.sum()) for n in range(prepared.num_examples)]
    assert found.supervised.sum() == counts["supervised_tokens"]
    assert found.copies == [(len(HOSTILE) * 3 - 3, 0)]
    assert found.ends_in_control.all()
    assert f"{counts['tokens']:,}" in page and f"{counts['fill'] * 100:.2f}%" in page
    assert "6 unknown_format" in page and "1 invalid_json" in page and "3 overlong" in page


class Added:
    """A token of `added_tokens_decoder`."""

    def __init__(self, content, special=True):
        self.content, self.special = content, special


class Vocabulary:
    """What `Marked` asks of a tokenizer."""

    bos_token_id = pad_token_id = None
    unk_token_id, eos_token_id = 7, 1
    added_tokens_decoder: ClassVar = {
        1: Added("<eos>"),
        2: Added("   "),
        3: Added("protein", special=False),
        4: Added("<think>", special=False),
        7: Added("<unk>"),
        9: Added("<eos>>", special=False),
    }


def test_control_tokens_are_no_words_and_are_found_where_they_are_spelled():
    marked = Marked.of(Vocabulary)
    assert set(marked.control) == {1, 4, 9} and marked.unknown == 7
    assert marked.spelled("a <eos> protein <thin <eos>>") == {"<eos>", "<eos>>"}
    Vocabulary.eos_token_id = 7
    assert Marked.of(Vocabulary).unknown is None and 7 in Marked.of(Vocabulary).control


def test_where_the_targets_end():
    ids, starts = np.array([1, 5, 5, 9, 5, 9, 5, 5, 5, 9, 5]), np.array([0, 3, 6, 9, 11])
    mask = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    table = np.arange(12) == 9
    control, unknown, ends = survey._looked(ids, mask, starts, table, 1)
    assert control.tolist() == [0, 2, 0, 1] and unknown.tolist() == [1, 0, 0, 0]
    assert ends.tolist() == [False, True, False, True]  # the control token before the third's targets is another's


def test_the_extremes_are_shown_and_named(made):
    prepared, tokenizer = made
    found = survey.survey(prepared, Marked.of(tokenizer))
    why = survey.chosen(prepared, found, 2, 0)
    assert "longest" in why[int(found.lengths.argmax())] and "shortest" in why[int(found.lengths.argmin())]
    assert "smallest trained share" in why[int(found.shares.argmin())]
    assert sum("drawn" in reasons for reasons in why.values()) == 2
    assert {prepared.example(number).source for number in why} == {0, 1}


def test_reasons_come_from_the_manifest_and_their_lines_from_the_rejects(made, monkeypatch):
    prepared, _ = made
    read = {reason.name: reason for reason in survey.reasons(prepared, 2)}
    assert {name: reason.count for name, reason in read.items()} == {
        "unknown_format": 6,
        "overlong": 3,
        "invalid_json": 1,
    }
    assert [len(reason.first) for reason in read.values()] == [2, 2, 1]
    monkeypatch.setattr(survey, "_MOST_REJECT_BYTES", 1)
    assert [reason.count for reason in survey.reasons(prepared, 2)] == [6, 3, 1]
    assert sum(len(reason.first) for reason in survey.reasons(prepared, 2)) == 1


def test_what_the_run_file_asks_for_is_no_alarm(made):
    """Cleaning, repetitions, selection: as the manifest has them where they are asked for."""
    prepared, tokenizer = made
    manifest = copy.deepcopy(dict(prepared.manifest))
    manifest["settings"] |= {"deduplicate": {"method": "near"}, "clean": ["<b>"]}
    manifest["selection"] = {"by": "ifd"}
    first = manifest["sources"][0]
    first["conversations"]["dropped"] |= {"near_duplicate": 12, "clean_refusal": 3, "not_selected": 40}
    first |= {"cleaned": {"markup": 7}, "flagged": {"email": 2}}
    shown = html_page(dataclasses.replace(prepared, manifest=manifest), tokenizer, 1, 0)
    alarms, notes = ([text for found, text in FINDING.findall(shown) if found == level] for level in ("warn", "note"))
    assert not any("near_duplicate" in text or "clean_refusal" in text for text in alarms)
    assert any("40 not_selected, 12 near_duplicate, 3 clean_refusal" in text for text in notes)
    assert any("7 markup" in text for text in notes) and any("2 email" in text for text in notes)
    assert "12 conversations left out" in shown and "[&#34;&lt;b&gt;&#34;]" in shown


def test_a_part_of_the_tokens_is_read_where_there_are_too_many(made, monkeypatch):
    prepared, tokenizer = made
    monkeypatch.setattr(survey, "MOST_TOKENS", 2)
    found = survey.survey(prepared, Marked.of(tokenizer))
    assert (
        len(found.lengths) == prepared.num_examples == len(found.looked)
    )  # one record batch: the first is always read


def test_what_is_too_long_is_shown_by_runs_then_by_its_ends(made):
    prepared, tokenizer = made
    marked = Marked.of(tokenizer)
    number = int(survey.survey(prepared, marked).lengths.argmax())
    example = prepared.example(number)
    whole = conversations(prepared, tokenizer, marked, {number: []}, room=1 << 20)[0]
    runs = conversations(prepared, tokenizer, marked, {number: []}, room=len(whole.body) // 2)[0]
    ends = conversations(prepared, tokenizer, marked, {number: []}, room=300)[0]
    assert not whole.note and runs.note and ends.note
    assert len(ends.body) < 700 < 900 < len(runs.body) < len(whole.body)
    assert re.sub("<[^>]*>", "", runs.body) == re.sub("<[^>]*>", "", whole.body)
    left_out = int(re.search(r"… ([\d,]+) tokens not shown", ends.body)[1].replace(",", ""))
    assert 0 < left_out < len(example.input_ids)


def test_the_page_is_bounded_and_what_is_short_stays_whole(made):
    prepared, tokenizer = made
    marked, why = Marked.of(tokenizer), {number: [] for number in range(prepared.num_examples)}
    sizes = {one.number: len(one.body) for one in conversations(prepared, tokenizer, marked, why)}
    shown = conversations(prepared, tokenizer, marked, why, room=40_000)
    assert [one.number for one in shown] == list(why)
    assert sum(sizes.values()) > 100_000 and sum(len(one.body) for one in shown) < 60_000
    for one in shown:
        assert one.note or len(one.body) == sizes[one.number]
        assert not (one.note and sizes[one.number] <= 40_000 // len(why))
    assert any(one.note for one in shown)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (10, 40), (1, 7), (55, 1024), (3, 131_072), (1000, 1001)])
def test_every_length_has_its_bar(low, high):
    ends = charts.ladder(low, high)
    assert ends == sorted(set(ends)) and ends[-1] == high and ends[0] >= low
    values = np.array([low, low, high, (low + high) // 2])
    chart = charts.of_counts("t", "example", values, "token", None, high, ("longer", 3))
    assert sum(bar.count for bar in chart.bars) == 7 and chart.bars[-1].beyond
    assert all(bar.x >= 0 and bar.x + bar.width <= 100.001 for bar in chart.bars)


def test_rows_are_drawn_to_scale(made):
    prepared, _ = made
    for number, row in enumerate(charts.row_pictures(prepared, range(prepared.num_rows))):
        examples = prepared.row(number).tolist()
        widths = [len(prepared.example(one).input_ids) * 100 / prepared.max_length for one in examples]
        assert [width for _, width, _ in row.blocks] == pytest.approx(widths)
        assert [x for x, _, _ in row.blocks] == pytest.approx(np.cumsum([0, *widths])[:-1])
        trained = sum(width for _, width in row.trained)
        assert trained == pytest.approx(
            prepared.rows_supervised[number] * 100 / prepared.max_length, abs=0.3 * len(examples)
        )
    assert prepared.row_sizes().tolist() == [len(prepared.row(number)) for number in range(prepared.num_rows)]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "sp_2k", "mistral_v1", "t5", "byte_bpe_2k"])
def test_pieces_make_up_the_whole(shared_data, name):
    tokenizer = load_tokenizer(ModelSection(path=str(shared_data / "tokenizers" / name)), Path.cwd())
    text = f"  Two  spaces,\n\n\tä tab 龘𝔘🧑‍🚀 {HOSTILE[11]} the end "
    ids = np.array(tokenizer(text)["input_ids"])
    whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found = list(pieces(tokenizer, ids, np.ones(len(ids), dtype=bool)))
    assert "".join(piece.text for piece in found) == whole
    assert [number for piece in found for number in piece.ids] == ids.tolist()
    halves = list(pieces(tokenizer, ids, np.arange(len(ids)) % 2 == 0))
    assert [piece.ids for piece in halves] == [(number,) for number in ids.tolist()]


def run_file(base):
    (base / "data.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"i{n}", "output": f"o{n}"}) for n in range(8))
    )
    run = {
        "name": "small",
        "model": {"path": "builtin:tiny-llama"},
        "data": {"sources": [{"path": "data.jsonl"}], "max_length": 64},
    }
    (base / "run.yaml").write_text(json.dumps(run))
    return base / "run.yaml"


def test_the_command_writes_replaces_and_refuses(tmp_path, monkeypatch, capsys):
    from dstune.cli.main import main

    monkeypatch.chdir(tmp_path)
    run = str(run_file(tmp_path))
    assert main(["preview", run, "--html", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"html": str(tmp_path / "page.html")}
    first = (tmp_path / "page.html").read_text()
    assert first.startswith("<!DOCTYPE html>") and ">7<" in first
    assert main(["preview", run, "--html", "page.html", "--count", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert len((tmp_path / "page.html").read_text()) < len(first)
    kept = (tmp_path / "data.jsonl").read_text()
    assert main(["preview", run, "--html", "data.jsonl"]) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "data.jsonl").read_text() == kept
    (tmp_path / "mine.html").write_text("mine")
    assert main(["preview", run, "--html", "mine.html", "--overwrite"]) == 0
    assert (tmp_path / "mine.html").read_text() == first
    assert main(["preview", run, "--seed", "-1"]) == 2
    for place in ("nowhere/page.html", "."):
        with pytest.raises(UsageError):
            api.preview_html(run, file=place)
    assert not list(tmp_path.glob(".*tmp"))


def test_the_same_data_makes_the_same_page(made, page):
    assert html_page(*made, count=100, seed=0) == page
    assert sys.getsizeof(page) < 3 << 20
