"""The report: the content of its three files, the escaping of what models say, and the page in a browser."""

import json
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from utils.errors import UserError
from utils.logging.loss_curve import loss_curves, nice_ticks, thinned
from utils.prompt_eval.answer_metrics import compare_scores, summarize
from utils.prompt_eval.answers import Answer, Results
from utils.prompt_eval.config import STRATEGIES, EvalConfig
from utils.prompt_eval.report import mark_differences, markdown, page, rows, write_report
from utils.train.perplexity import Evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & $title ${x} "quoted" \'too\''
PROMPTS = ["Human: How does a telescope work? Assistant:", f"Human: {EVIL} Assistant:"]
ON_ONE = Evaluation(20.5, 3.0, 0.5)
EVALUATION = Evaluation(2014.9, 7.6, 0.0531, {"<i>one</i>.jsonl": ON_ONE, "other": ON_ONE})
SAID = {
    "baseline": ["It uses uses uses glass. " * 3, EVIL],
    "finetuned": ["It uses glass to gather light.", f"{EVIL} ````` 望远镜"],
}


def make(folder="", several=1, scores=True, strategies=("greedy", "contrastive")):
    """Configuration, results and figures of a comparison with two prompts."""
    args = Namespace(
        model_name_or_path_baseline="<b>base</b>", model_name_or_path_finetune=str(folder),
        num_return_sequences=several, max_new_tokens=32, seed=1, diversity_penalty=0.5, temperature=1.0, top_p=0.9,
        top_k=4, penalty_alpha=0.6, repetition_penalty=1.0, sampling_top_k=50, stop_at_human=True, interactive=False,
    )  # fmt: skip
    config = EvalConfig(args, tuple(strategies), tuple(PROMPTS), num_beams=4, num_beam_groups=2)
    results, figures = {}, {strategy: {} for strategy in strategies}
    for name, texts in SAID.items():
        answers = [
            [Answer(prompt, text + "!" * place, 7, name == "finetuned") for place in range(several)]
            for prompt, text in zip(PROMPTS, texts, strict=True)
        ]
        results[name] = Results(dict.fromkeys(strategies, answers), EVALUATION)
        flat = [answer for of_prompt in answers for answer in of_prompt]
        for strategy in strategies:
            figures[strategy][name] = summarize([a.text for a in flat], [7] * len(flat), [a.ended for a in flat])
    if scores:
        for of_strategy in figures.values():
            of_strategy["scores"] = {"baseline": [1.0, 2.0] * several, "finetuned": [3.0, 2.0] * several}
            of_strategy["wins"] = compare_scores(*of_strategy["scores"].values())
    return config, results, figures


class Page(HTMLParser):
    """Tags, and the text inside chosen classes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sides, self.marks, self.questions = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes).get("class", "")))
        if tag == "p" and self.open[-2][1].startswith("side "):
            self.sides.append("")
        if tag == "h3":
            self.questions.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "p" in inside and any(name.startswith("side ") for _, name in self.open):
            self.sides[-1] += data
        if inside and inside[-1] == "mark":
            self.marks.append(data)
        if inside and inside[-1] == "h3":
            self.questions[-1] += data


def test_nothing_a_model_says_becomes_markup(tmp_path):
    html = page(*make(tmp_path))
    seen = Page(html)
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("script") == 1 and "img" not in tags and "b" in tags
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert html.count("</script>") == 1 and "<b>base</b>" not in html
    assert seen.questions == [prompt.strip() for prompt in PROMPTS]
    assert seen.sides == [text.strip() for number in (0, 1) for _ in (0, 1) for text in (SAID[n][number] for n in SAID)]


def test_the_page_needs_nothing_else(tmp_path):
    html = page(*make(tmp_path))
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "base") and not {"src", "href"} & set(attributes)
    outside_of_texts = re.sub(r"<article.*</article>", "", html, flags=re.DOTALL)
    assert "http://" not in outside_of_texts and "https://" not in outside_of_texts and "@import" not in html
    assert "prefers-color-scheme: dark" in html and "default-src 'none'" in html and "$" not in outside_of_texts


def test_differences_are_marked():
    assert mark_differences("a b c", "a x c") == ("a <mark>b</mark> c", "a <mark>x</mark> c")
    assert mark_differences("same <i>", "same  <i>") == ("same &lt;i&gt;", "same  &lt;i&gt;")
    assert mark_differences("", "new one") == ("", "<mark>new one</mark>")
    assert mark_differences("望远镜", "望近镜") == ("望<mark>远</mark>镜", "望<mark>近</mark>镜")
    left, right = mark_differences("one two three", "zero one three four")
    assert left == "one <mark>two</mark> three" and right == "<mark>zero</mark> one three <mark>four</mark>"


def test_three_files_and_every_answer(tmp_path):
    config, results, figures = make(tmp_path, several=2)
    folder = tmp_path / "a" / "b"
    assert write_report(str(folder), config, results, figures) == str(folder / "report.html")
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert records == rows(config, results, figures) and len(records) == 2 * 2 * 2 * 2
    for record in records:
        text = SAID[record["model"]][record["prompt_number"] - 1] + "!" * (record["answer_number"] - 1)
        assert record["answer"] == text and record["prompt"] == PROMPTS[record["prompt_number"] - 1]
        place = 2 * (record["prompt_number"] - 1) + record["answer_number"] - 1
        assert record["score"] == figures[record["strategy"]]["scores"][record["model"]][place]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count('class="pair"') == 8 and "Contrastive Search, answer 2" in html
    assert "2 / 2 / 0" in html and "2015" in html and "5.31%" in html and "&lt;i&gt;one&lt;/i&gt;.jsonl" in html


def test_answers_in_training_are_shown_where_the_run_had_prompts(tmp_path):
    """Their texts are escaped; those of an earlier run of the folder are not shown."""
    records = [{"step": step, "prompt": EVIL, "answer": f"{EVIL} at {step}", "ended": True} for step in (0, 5)]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"sample_prompts": None}}))
    assert "while training" not in page(*make(tmp_path)) + markdown(*make(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"sample_prompts": "p.txt"}}))
    html, text = page(*make(tmp_path)), markdown(*make(tmp_path))
    tags = [tag for tag, _ in Page(html).tags]
    assert tags.count("details") == 1 and tags.count("script") == 1 and "img" not in tags
    assert "at 0</p>" in html and "at 5</p>" in html and "* step 5: &lt;/script&gt;" in text


def test_markdown_holds_the_same(tmp_path):
    config, results, figures = make(tmp_path)
    text = markdown(config, results, figures)
    assert "* perplexity of baseline: 2014.9 (loss 7.6, token accuracy 5.31%)" in text
    assert "  * on other: 20.5 (loss 3, token accuracy 50.00%)" in text
    assert "1 won, 1 tied, 0 lost" in text
    for strategy in config.strategies:
        assert text.count(f"**{STRATEGIES[strategy]}, after**") == 2
    # A block of code ends with a fence of its own only: longer than any in the answer.
    assert f"``````text\n{SAID['finetuned'][1]}\n``````" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + 4


def test_without_a_scorer_and_perplexity(tmp_path):
    config, results, figures = make(tmp_path, scores=False)
    results = {name: Results(result.answers) for name, result in results.items()}
    html, text = page(config, results, figures), markdown(config, results, figures)
    assert "wins /" not in html and "perplexity" not in html and "perplexity" not in text and "won" not in text
    assert all("score" not in record for record in rows(config, results, figures))


def test_training_curves_only_where_there_are_metrics(tmp_path):
    assert loss_curves(str(tmp_path)) == "" and "<svg" not in page(*make(tmp_path))
    records = [{"step": 0, "eval_loss": 4.0, "perplexity": 54.6}, {"step": 2, "eval_loss": None}]
    records += [{"step": step, "loss": 4 - step / 500} for step in range(1, 1501)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    drawn = loss_curves(str(tmp_path))
    training = re.search(r'class="training" points="([^"]+)"', drawn)[1].split()
    assert 400 < len(training) <= 601
    places = [tuple(map(float, point.split(","))) for point in training]
    assert places == sorted(places) and places[0][1] < places[-1][1], "losses fall, so the line goes down the page"
    assert drawn.count("<circle") == 1 and "<svg" in page(*make(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss"')
    assert loss_curves(str(tmp_path)) == ""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert "NaN" not in loss_curves(str(tmp_path)).upper() and "<polyline" in loss_curves(str(tmp_path))


def test_ticks_are_round_and_cover():
    assert nice_ticks(0, 7.6) == [0, 2, 4, 6, 8]
    assert nice_ticks(0.92, 1.04) == [0.92, 0.94, 0.96, 0.98, 1.0, 1.02, 1.04]
    assert nice_ticks(2.5, 2.5)[0] <= 2.5 <= nice_ticks(2.5, 2.5)[-1]
    points = [(float(step), 0.0) for step in range(1999)]
    assert thinned(points)[-1] == points[-1] and len(thinned(points)) <= 601 and thinned(points[:3]) == points[:3]


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_report(str(tmp_path / "file" / "report"), *make(tmp_path))


# Loads the page in a frame of a phone's width, uses it as a reader would, and leaves what it saw in the title.
DRIVER = """<body style="margin:0">
<iframe id="page" src="report.html" style="width:{width}px;height:800px;border:0"></iframe>
<script>
page.onload = function () {{
  var d = page.contentDocument, seen = {{}};
  var shown = function () {{
    var pairs = Array.from(d.querySelectorAll(".pair"));
    return pairs.map(function (pair) {{ return pair.getClientRects().length ? 1 : 0; }}).join("");
  }};
  seen.width = d.documentElement.scrollWidth;
  seen.script = typeof page.contentWindow.evil;
  seen.background = page.contentWindow.getComputedStyle(d.body).backgroundColor;
  var sides = d.querySelectorAll(".pair .side");
  seen.beside = sides[0].getBoundingClientRect().top === sides[1].getBoundingClientRect().top;
  seen.all = shown();
  var button = d.querySelector('button[data-strategy="contrastive"]');
  button.click(); seen.greedy = shown(); button.click();
  var search = d.getElementById("search");
  search.value = "GATHER light"; search.dispatchEvent(new Event("input")); seen.found = shown();
  search.value = "nowhere"; search.dispatchEvent(new Event("input")); seen.none = shown();
  seen.says = d.getElementById("nothing").getClientRects().length;
  search.value = ""; search.dispatchEvent(new Event("input"));
  d.getElementById("differ").click(); seen.differ = shown(); seen.count = d.getElementById("count").textContent;
  document.title = JSON.stringify(seen);
}};
</script>"""


def browse(folder, width, *flags):
    """What the driver saw in headless Chromium."""
    (folder / "driver.html").write_text(DRIVER.format(width=width))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,900",
         "--disable-web-security", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=4000", *flags, f"file://{folder / 'driver.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_the_page_in_a_browser(tmp_path, width, dark):
    config, results, figures = make(tmp_path)
    same = results["baseline"].answers["greedy"][1]
    results["finetuned"].answers["contrastive"] = [results["finetuned"].answers["greedy"][0], same]
    prompts = (f"{PROMPTS[0]} {'x' * 400}", PROMPTS[1].replace("alert", "evil=alert"))
    write_report(str(tmp_path), replace(config, prompts=prompts), results, figures)
    dom = browse(tmp_path, width, "--dump-dom", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))
    assert seen["width"] == width, "the page must not scroll sideways"
    assert seen["script"] == "undefined"
    assert seen["background"] == ("rgb(18, 21, 26)" if dark else "rgb(246, 247, 249)")
    assert seen["beside"] == (width > 640)
    assert seen["all"] == "1111" and seen["greedy"] == "1010" and seen["found"] == "1100"
    assert seen["none"] == "0000" and seen["says"] == 1
    assert seen["differ"] == "1110" and seen["count"] == "2 of 2 prompts"
