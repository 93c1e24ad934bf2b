"""Pages and tables of runs, from folders as runs leave them; the browser has tests of its own (tests/browser)."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from look_fixtures import ROWS, finished_run, write_test

from trainer.__main__ import act
from trainer.config import Config, EvalConfig, LaunchConfig, OptimConfig
from trainer.config.cost import CostConfig
from trainer.drive.look import compare, tables
from trainer.drive.look.chart import MOST, Series, chart, thinned
from trainer.drive.look.gather import RunLook, look_at
from trainer.drive.look.html import Markup, element, text
from trainer.drive.look.page import page_of_one, page_of_several
from trainer.drive.look.scores import Answer, worst_answers
from trainer.errors import RunError, UserError
from trainer.evaluate.texts import token_f1
from trainer.paths import RunFolder
from trainer.records import Curve

NOW = datetime(2026, 11, 23, 18, 0, tzinfo=UTC)
SECRET = "hf_" + "a1B2" * 9


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "a")


def rows_of(table: tables.Table | None) -> dict[str, list[str]]:
    assert table is not None
    return {row[0]: row[1:] for row in table.rows}


def page(path: Path, *runs: RunFolder) -> str:
    act(["show", "--html", str(path), *(str(run.root) for run in runs)], Path.cwd())
    return path.read_text("utf-8")


def test_a_page_is_one_file_that_names_nothing_outside(run: RunFolder, tmp_path: Path) -> None:
    written = page(tmp_path / "one.html", run)
    assert not re.findall(r"(?i)https?:|//|@import|url\(|<script|<link|<img|src=|href=", written)
    assert "default-src 'none'" in written.replace("&#x27;", "'")


def test_data_of_every_kind_is_escaped(tmp_path: Path) -> None:
    """Names, labels, answers and values of the config come from outside."""
    evil = '"><script>alert(1)</script>&amp;\x00'
    config = Config(optim=OptimConfig(lr=1e-3), launch=LaunchConfig(partition=evil))
    one = finished_run(tmp_path / "one", config, name=evil, answer=evil)
    two = finished_run(tmp_path / "two", identity="1111111111")
    scores = json.loads((one.evaluation / "tuned.json").read_text())
    scores["metrics"][evil] = 0.5
    scores["by_slice"] = {evil: {evil: {"rows": 3.0, "exact_match": 0.0}, "b": {"rows": 1.0, "exact_match": 1.0}}}
    (one.evaluation / "tuned.json").write_text(json.dumps(scores))
    looks = [look_at(one), look_at(two)]
    for written in (page_of_one(looks[0], now=NOW), page_of_several(looks, now=NOW)):
        assert written.count("alert(1)") >= 3
        assert "<script" not in written
        assert "&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;\ufffd" in written
        assert "\x00" not in written


def test_attributes_and_text_cannot_become_markup() -> None:
    assert (
        element("p", "<b>", Markup("<i></i>"), title='"x" <y>')
        == '<p title="&quot;x&quot; &lt;y&gt;">&lt;b&gt;<i></i></p>'
    )
    assert text("\udcff\x1b[31m") == "\ufffd\ufffd[31m"


def test_secrets_reach_neither_page_nor_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished_run(tmp_path / "one", Config(launch=LaunchConfig(options=[f"--export=KEY={SECRET}"])))
    two = finished_run(tmp_path / "two", answer=f"my key is {SECRET}")
    written = page(tmp_path / "two.html", one, two) + page(tmp_path / "one.html", two)
    act(["show", str(one.root), str(two.root)], Path.cwd())
    for said in (written, capsys.readouterr().out):
        assert "[redacted]" in said
        assert SECRET not in said


def test_what_training_does_not_depend_on_is_a_table_of_its_own(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one")
    config = Config(optim=OptimConfig(lr=1e-3), eval=EvalConfig(batch_tokens=8192), cost=CostConfig(pue=1.0))
    two = finished_run(tmp_path / "two", config)
    trained, besides = compare.config_tables([look_at(one), look_at(two)])
    assert rows_of(trained) == {"optim.lr": ["0.0002", "0.001"]}
    assert rows_of(besides) == {"eval.batch_tokens": ["4096", "8192"], "cost.pue": ["1.56", "1.0"]}


def test_long_values_that_differ_at_their_end_differ(tmp_path: Path) -> None:
    common = "x" * 60
    looks = [
        look_at(finished_run(tmp_path / end, Config(launch=LaunchConfig(partition=common + end)))) for end in ("a", "b")
    ]
    _, besides = compare.config_tables(looks)
    assert list(rows_of(besides)) == ["launch.partition"]


def looks_with(tmp_path: Path, first: list[bool], second: list[bool], *, test: str) -> list[RunLook]:
    runs = [finished_run(tmp_path / name, identity=name * 10) for name in ("a", "b")]
    write_test(runs[0], "tuned", first)
    write_test(runs[1], "tuned", second, test=test)
    return [look_at(run) for run in runs]


def test_runs_are_held_against_the_first_row_by_row(tmp_path: Path) -> None:
    looks = looks_with(tmp_path, [True] * 38 + [False] * 12, [True] * 36 + [False] * 2 + [True] * 12, test="5" * 64)
    (row,) = rows_of(compare.paired_table(looks)).values()
    assert row == ["+0.2000 (0.0569 to 0.3404), p 0.013", "12", "2", "better"]


@pytest.mark.parametrize(
    ("test", "rows", "why"),
    [("6" * 64, 50, "other test rows"), ("5" * 64, 49, "answers are missing, or of other rows"), ("", 50, "no record")],
)
def test_other_rows_are_not_held_against_each_other(tmp_path: Path, test: str, rows: int, why: str) -> None:
    looks = looks_with(tmp_path, [True] * 50, [True] * rows, test=test)
    (row,) = rows_of(compare.paired_table(looks)).values()
    assert row[0] == "-"
    assert row[-1].startswith(f"not compared: {why}")


def test_the_same_identity_twice_is_told_apart_by_folders(tmp_path: Path) -> None:
    looks = [look_at(finished_run(tmp_path / name)) for name in ("a", "b")]
    assert compare.names_of(looks) == [f"clauses/0123456789 ({tmp_path / name})" for name in ("a", "b")]


def test_token_f1_has_an_interval_where_the_rows_give_it(run: RunFolder) -> None:
    path = run.evaluation / "tuned.json"
    scores = json.loads(path.read_text())
    answers = [json.loads(line) for line in (run.evaluation / "tuned.predictions.jsonl").read_text().splitlines()]
    mean = sum(token_f1(answer["text"], answer["answer"]) for answer in answers) / ROWS
    for value, known in ((mean, True), (mean + 0.01, False)):
        scores["metrics"]["token_f1"] = value
        path.write_text(json.dumps(scores))
        figures = look_at(run).evaluated["tuned"].figures
        assert (figures["token_f1"].interval is not None) is known
        assert figures["macro_f1"].interval is None


def test_worst_answers_and_weak_slices_come_first(run: RunFolder) -> None:
    look = look_at(run)
    worst = tables.worst_table(look)
    assert worst is not None
    wrong = sum(not answer.correct for answer in look.evaluated["tuned"].answers)
    assert worst.notes[0].startswith(f"10 of {wrong} wrong answers")
    assert [float(row[-1]) for row in worst.rows] == sorted(float(row[-1]) for row in worst.rows)
    (by_label,) = tables.slice_tables(look)
    shares = [float(row[-1]) for row in by_label.rows]
    assert shares == sorted(shares)
    assert len(shares) == 4


def test_the_worst_answer_is_the_furthest_from_its_reference() -> None:
    def answer(text: str, *, correct: bool = False) -> Answer:
        return Answer(id=text, text=text, answer="no liability", correct=correct, stopped=True)

    found = worst_answers([answer("no warranty"), answer("no liability", correct=True), answer("MIT")], 2)
    assert [one.id for one in found] == ["MIT", "no warranty"]


def test_a_page_with_test_texts_says_so(run: RunFolder) -> None:
    warning = "This page holds answers and references of test rows"
    assert warning in page_of_one(look_at(run), now=NOW)
    (run.evaluation / "tuned.predictions.jsonl").unlink()
    assert warning not in page_of_one(look_at(run), now=NOW)


def test_a_run_that_has_only_begun_is_a_page_too(run: RunFolder) -> None:
    for path in (run.metrics_jsonl, run.done, run.root / "splits.json"):
        path.unlink()
    for path in (*run.stages.iterdir(), *run.evaluation.iterdir(), *run.cost.iterdir()):
        path.unlink()
    look = look_at(run)
    assert (look.trained, look.evaluated, look.test, look.cost) == (None, {}, "", None)
    for written in (page_of_one(look, now=NOW), page_of_several([look, look], now=NOW)):
        assert "<svg" not in written
        assert written.count("<table") >= 2


def test_answers_that_are_none_are_refused(run: RunFolder) -> None:
    (run.evaluation / "tuned.predictions.jsonl").write_text("[]\n")
    with pytest.raises(RunError, match="the answers of this run cannot be read"):
        look_at(run)


def test_cost_adds_up_over_starts_and_ranks(run: RunFolder) -> None:
    rows = rows_of(tables.cost_table(look_at(run)))
    assert rows["train"][:2] == ["2", "2"], "two starts of two ranks on a GPU each, half an hour long"
    assert rows["together"][1] == "2.3"
    assert rows["together"][-1] == "0.976 kWh, 99 % measured, the rest estimated"
    assert rows["train"][3] == "245,760, 15,360 with loss"


def test_a_price_is_a_note_and_a_row(tmp_path: Path) -> None:
    one = look_at(finished_run(tmp_path / "one", Config(cost=CostConfig(price_per_gpu_hour=2.0))))
    two = look_at(finished_run(tmp_path / "two"))
    table = tables.cost_table(one)
    assert table is not None
    assert "price: 4.60, at 2 a GPU-hour" in table.notes
    assert rows_of(compare.cost_comparison([one, two]))["price"] == ["4.60", "-"]


@pytest.mark.parametrize("name", ["plan.json", "page", "."])
def test_only_a_page_is_overwritten(run: RunFolder, name: str) -> None:
    before = run.plan_json.read_bytes()
    with pytest.raises(UserError, match="this is no name for a page"):
        page(run.root / name, run)
    assert run.plan_json.read_bytes() == before


def test_a_page_that_cannot_be_written_is_said(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the page cannot be written"):
        page(tmp_path / "file" / "x.html", run)


def test_long_curves_are_means_of_neighbours() -> None:
    curve = Curve(list(range(1, 1001)), [float(value) for value in range(1000)])
    short = thinned(curve)
    assert len(short.values) == len(short.steps) == MOST
    assert short.steps[-1] == 1000
    assert sum(short.values) / MOST == pytest.approx(499.5, abs=5)
    assert thinned(Curve([1, 2], [3.0, 4.0])).values == [3.0, 4.0]
    assert "means of neighbours" in chart("loss", [Series("a", curve, 0)])


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [1e-9, 1e9], [5.0, 4.0, 1e-3]])
def test_any_values_have_a_chart(values: list[float]) -> None:
    drawn = chart("x", [Series("a", Curve(list(range(len(values))), values), 0)])
    places = [float(number) for pair in re.findall(r'points="([^"]+)"', drawn)[0].split() for number in pair.split(",")]
    assert len(places) == 2 * len(values)
    assert all(0 <= place <= 440 for place in places)
    assert "nan" not in drawn
    assert drawn.count('class="grid"') >= 2


def test_a_figure_that_is_not_finite_is_left_out(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    lines[3]["loss"] = "nan"
    run.metrics_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(look_at(run).curves["loss"].values) == len(lines) - 1
