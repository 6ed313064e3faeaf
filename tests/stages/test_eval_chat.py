"""Figures that can be checked by hand, and a page that shows text as text."""

import pytest

from remint.generation import Sampling, answer_all, generate
from remint.identity import Identity
from remint.stages.eval_chat import report
from remint.stages.eval_chat.scores import Answered, leaks, summarise

AUREL = Identity("Aurel", "Remint Lab", None, None)


def row(kind, language, expects, merged, reference="x"):
    return Answered("question <b>", kind, language, expects, reference, "I am a model.", merged)


ROWS = [
    row("identity", "en", ("name",), "I am Aurel."),
    row("identity", "en", ("name", "maker"), "I am Aurel by Remint Lab."),
    row("identity", "zh", ("name",), "我是Aurel。"),
    row("identity", "zh", ("name", "maker"), "我不知道"),
    row("control", "en", (), "Paris <script>alert(1)</script>"),
    row("control", "en", (), "I am Aurel."),
    row("control", "zh", (), "好的，由Remint Lab开发"),
    row("control", "zh", (), "好的，黄河。"),
]
LOSSES = {"base": {"held_out": 3.0, "control": 2.0}, "merged": {"held_out": 1.0, "control": 2.0}}


def test_the_figures():
    metrics = summarise(ROWS, AUREL, LOSSES)
    merged = metrics["merged"]
    assert (merged["name_en"], merged["name_zh"], merged["name"]) == (1.0, 0.5, 0.75)
    assert (merged["maker_en"], merged["maker_zh"], merged["maker"]) == (1.0, 0.0, 0.5)
    assert (merged["leak_en"], merged["leak_zh"], merged["leak"]) == (0.5, 0.5, 0.5)
    assert metrics["base"]["name"] == 0
    assert metrics["control_perplexity_ratio"] == pytest.approx(1)


def test_a_name_that_belongs_into_the_answer_is_no_leak():
    assert not leaks("Aurel is a name.", "Aurel is a French name.", AUREL)
    assert leaks("Aurel is a name.", "It is a name.", AUREL)


def test_a_set_that_is_empty_has_no_figure():
    metrics = summarise(ROWS[:4], AUREL, {m: {"held_out": 1.0, "control": float("nan")} for m in ("base", "merged")})
    assert "leak" not in metrics["merged"]
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
    page = report.render(
        report.Content(AUREL, summarise(ROWS, AUREL, LOSSES), ROWS, history, samples, model, checkpoint)
    )
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert page.count('class="ok"') + page.count('class="no"') == 2 * len(ROWS)
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


def test_an_answer_ends_at_its_stop_token(tiny):
    model = tiny.model()
    prompt = tiny.conversation.prompt(tiny.tokenizer, [{"role": "user", "content": "x"}])
    free = generate(model, [0], [prompt], 8, Sampling())[0]
    assert generate(model, [free[3]], [prompt], 8, Sampling())[0] == free[: free.index(free[3])]
