"""Figures that can be checked by hand, and a page that shows text as text."""

import contextlib
import math
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from remint.compute.generation import Sampling, answer_all, decode, generate
from remint.core.errors import SettingsError
from remint.identity import Identity
from remint.stages.eval_chat import asking, report
from remint.stages.eval_chat.scores import Answered, Count, by_topic, leaks, marks, summarise
from remint.stages.eval_chat.settings import EvalChat

AUREL = Identity("Aurel", "Remint Lab", None, None)


def row(kind, language, expects, merged, reference=None, base="I am a model.", accept=()):
    reference = reference or {"en": "I see.", "zh": "好的。"}[language]
    return Answered("question <b>", kind, language, expects, accept, reference, base, merged)


ROWS = [
    row("identity", "en", ("name",), "I am Aurel."),
    row("identity", "en", ("name", "maker"), "I am Aurel by Remint Lab."),
    row("identity", "zh", ("name",), "我是Aurel。"),
    row("identity", "zh", ("name", "maker"), "我不知道"),
    row("control", "en", (), "Paris <script>alert(1)</script>"),
    row("control", "en", (), "I am Aurel."),
    row("control", "zh", (), "好的，由Remint Lab开发"),
    row("control", "zh", (), "好的，黄河。"),
    row("control", "en", (), "It is Ottawa.", base="Ottawa", accept=("Ottawa",)),
    row("control", "en", (), "It is Quebec.", base="It's Bern.", accept=("Bern", "Berne")),
    row("control", "en", (), "It is Rome.", base="It is Oslo.", accept=("Rome",)),
    row("control", "zh", (), "好的，是2。", base="是 3。", accept=("3", "三")),
]
LOSSES = {"base": {"held_out": 3.0, "control": 2.0}, "merged": {"held_out": 1.0, "control": 2.0}}


def test_the_figures():
    metrics = summarise(ROWS, AUREL, LOSSES)
    merged = metrics["merged"]
    assert (merged["name_en"], merged["name_zh"], merged["name"]) == (1.0, 0.5, 0.75)
    assert (merged["maker_en"], merged["maker_zh"], merged["maker"]) == (1.0, 0.0, 0.5)
    assert (merged["leak_en"], merged["leak_zh"], merged["leak"]) == (1 / 5, 1 / 3, 2 / 8)
    assert metrics["base"]["name"] == 0
    assert (merged["facts_en"], merged["facts_zh"], merged["facts"]) == (2 / 3, 0.0, 0.5)
    assert metrics["base"]["facts"] == 0.75
    assert (metrics["facts_kept_en"], metrics["facts_kept_zh"], metrics["facts_kept"]) == (0.5, 0.0, 1 / 3)
    assert metrics["control_perplexity_ratio"] == pytest.approx(1)


def test_a_share_has_its_wilson_interval():
    """From the formula of Wilson (1927) with z = 1.959964."""
    z = 1.959964
    for hits, total in ((0, 10), (8, 10), (97, 100), (5, 5)):
        p = hits / total
        middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
        half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
        assert Count(hits, total).interval == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_how_near_answers_are_to_the_base():
    rows = [
        replace(row("control", "en", (), "Yes, it is.", base="Yes, it is."), same_start=True),
        replace(row("control", "en", (), "Yes, it is not.", base="Yes, it is."), same_start=True),
        row("control", "zh", (), "好的。", base="是。"),
        replace(row("identity", "en", ("name",), "x", base="x"), same_start=True),
    ]
    metrics = summarise(rows, AUREL, LOSSES, divergence=0.25)
    assert (metrics["same_start_en"], metrics["same_start_zh"], metrics["same_start"]) == (1, 0, 2 / 3)
    assert (metrics["same_answer_en"], metrics["same_answer"]) == (1 / 2, 1 / 3)
    assert metrics["divergence"] == 0.25
    assert "divergence" not in summarise(rows, AUREL, LOSSES)


def test_counts_by_topic():
    rows = [
        replace(row("identity", "en", ("name",), "I am Aurel."), topic="slang"),
        replace(row("identity", "en", ("name",), "I am Bob."), topic="slang"),
        replace(row("control", "en", (), "I am Aurel."), topic="thanks"),
        row("control", "en", (), "I am Aurel."),
    ]
    assert by_topic(rows, AUREL) == {"right": {"slang": Count(1, 2)}, "leaks": {"thanks": Count(1, 1)}}


def test_the_base_does_not_diverge_from_itself_and_another_model_does(tiny, tmp_path):
    messages = [[{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}] for n in range(5)]
    records = [("control" if n else "held_out", {"messages": message}) for n, message in enumerate(messages)]
    other = tmp_path / "other"
    shutil.copytree(tiny.folder, other)
    tensors = {name: tensor + 0.05 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    base = asking.ask("base", tiny.folder, tiny.conversation, records, EvalChat(20, 2))
    same, changed = (
        asking.ask("merged", folder, tiny.conversation, records, EvalChat(20, 2), base.said)
        for folder in (tiny.folder, other)
    )
    assert len(base.said) == 4
    assert max(doc.learned for doc in base.said) == asking._DIVERGENCE_TOKENS
    assert math.isnan(base.divergence)
    assert same.divergence == pytest.approx(0, abs=1e-5)
    assert same.answers == base.answers
    assert changed.divergence > 0.01


@pytest.mark.parametrize(
    ("prompt", "reference", "answer", "leaking"),
    [
        ("q", "It is a name.", "Aurel is a name.", True),
        ("q", "Aurel is a French name.", "Aurel is a name.", False),
        ("Is Aurel a name?", "Yes.", "Aurel is a name.", False),
        ("q", "It is a name.", "I am not Aurel.", True),
        ("祝你生日快乐", "谢谢。", "我是您的人工智能助手。", True),
        ("What is an AI assistant?", "A program.", "An AI assistant is a program.", False),
        ("q", "A manager.", "An assistant manager.", False),
    ],
)
def test_a_leak_is_what_neither_prompt_nor_reference_bring_up(prompt, reference, answer, leaking):
    asked = Answered(prompt, "control", "en", (), (), reference, "", answer)
    assert leaks(answer, asked, AUREL) is leaking


@pytest.mark.parametrize(
    ("language", "answer", "right"),
    [
        ("zh", "我是Aurel。", True),
        ("zh", "I am Aurel.", False),
        ("zh", "我不是Aurel。", False),
        ("en", "I am Aurel.", True),
        ("en", "我是Aurel。", False),
    ],
)
def test_a_name_counts_undenied_and_in_the_language_of_the_question(language, answer, right):
    asked = row("identity", language, ("name",), answer)
    assert marks(asked, "merged", AUREL) == {"right": right}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(2048, r"got 2048 for the question of 23 tokens 'Who\?'; lower it to 2025$"), (2025, None)],
)
def test_a_question_and_its_answer_must_fit_into_the_positions(tiny, tokens, said):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
        for text in ("", "Who?")
    ]
    with pytest.raises(SettingsError, match=said) if said else contextlib.nullcontext():
        asking.check_positions(tiny.folder, tiny.conversation, rows, EvalChat(tokens, 1))


def test_a_set_that_is_empty_has_no_figure():
    metrics = summarise(ROWS[:4], AUREL, {m: {"held_out": 1.0, "control": float("nan")} for m in ("base", "merged")})
    assert not {"leak", "facts"} & metrics["merged"].keys()
    assert "facts_kept" not in metrics
    assert "control_perplexity_ratio" not in metrics


def test_the_page_shows_text_as_text():
    history = [
        {"step": 0, "held_out_loss": 3.0},
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 2, "loss": 1.0, "lr": 0.2, "held_out_loss": 1.0},
    ]
    checkpoint = {
        "origin": {"base_name": "Tiny", "fingerprint": "f"},
        "steps": {"last": 2, "best": 2},
        "best_held_out_loss": 1.0,
        "lora": {"rank": 1, "alpha": 1, "dropout": 0, "targets": ["q_proj"]},
    }
    model = {
        "step": 2,
        "merge": {"into": "original"},
        "proof": {"agreement": 1.0, "positions": 9, "mean_divergence": 1e-5},
    }
    samples = [{"step": 0, "prompt": "p", "answer": "a"}]
    rows = [replace(row, topic="<i>") for row in ROWS]
    metrics = summarise(rows, AUREL, LOSSES, divergence=0.1)
    page = report.render(report.Content(AUREL, metrics, rows, history, samples, model, checkpoint))
    assert "&lt;i&gt;" in page
    assert "0.100" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    verdicts = page.count('class="verdict"')
    assert page.count('class="ok"') + page.count('class="no"') == 2 * len(ROWS) + verdicts
    assert "http" not in page.replace("http-equiv", "")


def test_a_curve_ends_where_its_values_do():
    line = report.curve([{"step": 0, "loss": 4.0}, {"step": 10, "loss": 0.0}], "loss")
    assert line["points"] == [(0.0, 0.0), (520.0, 150.0)]
    assert report.curve([{"step": 0}], "loss") is None


def test_answers_do_not_depend_on_their_company(tiny):
    model = tiny.model()
    histories = [[{"role": "user", "content": "x" * n}] for n in (1, 9, 4, 30, 2)]
    together = answer_all(model, tiny.tokenizer, tiny.conversation, histories, 12, batch=5)
    alone = [answer_all(model, tiny.tokenizer, tiny.conversation, [history], 12, batch=1)[0] for history in histories]
    assert together == alone


def test_an_answer_that_was_cut_is_marked_and_a_complete_one_is_not(tiny, monkeypatch):
    model, history = tiny.model(), [{"role": "user", "content": "x"}]
    written = generate(model, [0], [tiny.conversation.prompt(tiny.tokenizer, history)], 9, Sampling())[0]
    at = max(index for index, token in enumerate(written) if token not in written[:index])
    monkeypatch.setattr(type(tiny.conversation), "stop_ids", lambda *_: [written[at]])

    def answer(limit):
        return answer_all(model, tiny.tokenizer, tiny.conversation, [history], limit, 1, unfinished="…")[0]

    assert at > 0
    assert answer(at) == answer(at + 1) + "…"


def test_half_a_character_at_the_end_of_a_cut_answer_is_no_text(tiny):
    ids = tiny.tokenizer.encode("好的，明", add_special_tokens=False)
    texts = [decode(tiny.tokenizer, ids[:count]) for count in range(len(ids) + 1)]
    assert all("好的，明".startswith(text) for text in texts)
    assert texts[-1] == "好的，明"


def test_an_answer_ends_at_its_stop_token(tiny):
    model = tiny.model()
    prompt = tiny.conversation.prompt(tiny.tokenizer, [{"role": "user", "content": "x"}])
    free = generate(model, [0], [prompt], 8, Sampling())[0]
    assert generate(model, [free[3]], [prompt], 8, Sampling())[0] == free[: free.index(free[3])]
