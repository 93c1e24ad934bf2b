"""Bad data and models as a new user meets them: the words, the exit code 2, no traceback.

The driver's part runs in this process as ``python -m trainer prepare ...`` runs it; what it starts,
``trainer.prepare``, is called in this process too, and once for real.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer import console, prepare
from trainer.__main__ import act
from trainer.compose import compose
from trainer.errors import EXIT_USER
from trainer.paths import RunFolder, write_atomic
from trainer.plan import Devices, dump_plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
TINY = ("model=tiny", "model.dtype=float32", "launch.device=cpu", "optim.batch_packs=1", "packing.capacity=128")
GOOD = [json.dumps({"prompt": f"Clause {number}?", "completion": f"payment {number}"}) for number in range(40)]


def overrides(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"run.root={folder}/runs", f"run.cache={folder}/cache", "data=files", *more]


def attempt(folder: Path, *more: str) -> int:
    """Plan as the driver does and prepare as its child does; gives the exit code, everything printed."""

    def both() -> int:
        config = compose(overrides(folder, *more), config_dir=None, cwd=folder)
        plan = make_plan(config, devices=Devices(gpus=0, cores=1), cwd=folder)
        run = RunFolder(Path(plan.run_dir))
        write_atomic(run.plan_json, dump_plan(plan))
        return prepare.main([str(run.root)])

    return console.run_and_report(both)


def rows(folder: Path, lines: Sequence[str], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"data.train={folder}/{name}"


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What was printed, once it is known to be an error that the user can mend."""
    printed = capsys.readouterr()
    assert code == EXIT_USER, printed.err
    assert "Traceback" not in printed.out + printed.err
    assert "error: " in printed.err
    return printed.err


def test_a_missing_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(tmp_path, GOOD, "contracts.jsonl")
    arguments = ["prepare", *overrides(tmp_path, f"data.train={tmp_path}/contract.jsonl")]
    message = refused(capsys, console.run_and_report(lambda: act(arguments, tmp_path)))
    assert "data.train: there is no such file" in message
    assert "did you mean 'contracts.jsonl'?" in message
    assert not (tmp_path / "runs").exists()


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", *overrides(tmp_path, rows(tmp_path, []))]
    message = refused(capsys, console.run_and_report(lambda: act(arguments, tmp_path)))
    assert "is an empty file" in message
    assert "rows.jsonl" in message


def test_a_file_of_blank_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, ["", " "])))
    assert "rows.jsonl: has no rows" in message


def test_a_row_without_an_answer_is_counted_and_too_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_answer = json.dumps({"prompt": "Clause 99?"})
    assert attempt(tmp_path, rows(tmp_path, [*GOOD, no_answer])) == 0
    assert f"warning: left out 1 rows: no answer ({tmp_path}/rows.jsonl:41 (" in capsys.readouterr().err
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, [*GOOD, *[no_answer] * 10], "more.jsonl")))
    assert "10 of 50 rows would have to be left out" in message
    assert f"10 no answer ({tmp_path}/more.jsonl:41" in message
    assert "data.max_dropped_share" in message


def test_only_rows_without_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = json.dumps({"messages": [{"role": "user", "content": "Clause?"}]})
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, [said, said])))
    assert "rows.jsonl: no row can be used" in message
    assert "no answer: 2 rows" in message
    assert "rows.jsonl:1" in message


def test_line_3_is_not_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, [*GOOD[:2], '{"prompt": "Clause', *GOOD[2:]])))
    assert f"{tmp_path}/rows.jsonl:3: " in message
    assert "JSON" in message


def test_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(GOOD).encode() + '\n{"prompt": "é", "completion": "a"}\n'.encode("latin-1"))
    message = refused(capsys, attempt(tmp_path, f"data.train={path}"))
    assert "UTF-8" in message
    assert "rows.jsonl:41" in message


def test_columns_that_fit_no_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, ['{"question": "q", "reply": "a"}'])))
    assert "the columns fit no known shape of rows" in message
    assert "got: question, reply" in message
    assert "'data.columns={prompt: question, completion: reply}'" in message
    fixed = rows(tmp_path, [line.replace("prompt", "question").replace("completion", "reply") for line in GOOD])
    assert attempt(tmp_path, fixed, "data.columns={prompt: question, completion: reply}") == 0


def test_a_document_longer_than_the_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = json.dumps({"prompt": "pay " * 200, "completion": "yes"})
    train = rows(tmp_path, [*GOOD, long])
    held_out = ("data.validation_share=0", "data.test_share=0")
    message = refused(capsys, attempt(tmp_path, train, *held_out))
    assert "packing.capacity: 1 row is longer than a pack" in message
    assert f"{tmp_path}/rows.jsonl:41 has " in message
    assert "allowed: at most 128 tokens" in message
    assert all(choice in message for choice in ("packing.capacity=", "data.over_long=drop", "truncate", "split"))
    for choice in ("drop", "truncate", "split"):
        assert attempt(tmp_path, train, *held_out, f"data.over_long={choice}") == 0
    assert "longer than packing.capacity" in capsys.readouterr().err


def test_a_template_that_cannot_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It puts a thought before each answer: what would be learnt is not what the rows say."""
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ 'Hm. ' if m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, GOOD), f"model.chat_template={template}"))
    assert (
        "the chat template cannot be used with these rows: the template adds text of its own to the answer" in message
    )
    assert "before it: 'Hm. '" in message
    assert "<|im_start|>assistant\nHm. payment" in message
    assert "model.chat_template=builtin:chatml" in message
    assert attempt(tmp_path, rows(tmp_path, GOOD), "model.chat_template=builtin:chatml") == 0


def test_no_template_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path, rows(tmp_path, GOOD)) == 0
    (model,) = (tmp_path / "cache" / "models").iterdir()
    (model / "chat_template.jinja").unlink()
    message = refused(capsys, attempt(tmp_path, rows(tmp_path, GOOD), f"model.path={model}"))
    assert "the model's tokenizer has no chat template" in message
    assert "model.chat_template=builtin:chatml" in message


def test_a_model_folder_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path, rows(tmp_path, GOOD)) == 0
    (model,) = (tmp_path / "cache" / "models").iterdir()
    (model / "model.safetensors").unlink()
    arguments = ["prepare", *overrides(tmp_path, rows(tmp_path, GOOD), f"model.path={model}")]
    message = refused(capsys, console.run_and_report(lambda: act(arguments, tmp_path)))
    assert "model folder without weights" in message
    assert "config.json" in message


def test_the_whole_command_shows_the_words_of_its_child_once(tmp_path: Path) -> None:
    train = rows(tmp_path, [*GOOD[:2], "nothing"])
    command = [sys.executable, "-m", "trainer", "prepare", *overrides(tmp_path, train)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    printed = result.stdout + result.stderr
    assert result.returncode == EXIT_USER, printed
    assert printed.count("rows.jsonl:3: ") == 1
    assert "Traceback" not in printed
