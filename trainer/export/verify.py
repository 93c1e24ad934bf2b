"""``python -m trainer.export.verify RUN_DIR``: does what was exported answer like what was trained?

It runs after all ranks have ended, in a process that has never seen the model in memory, and loads the folders the way
a stranger would: plain transformers, plain peft, none of this project's attention. Only when this has passed does an
export count.

A model that an adapter was merged into is first compared with base and adapter number by number (``tensors.py``). Then
three comparisons per folder, over the golden prompts of ``inference.json``:

1. Log-probabilities of the likeliest next tokens along the recorded answers, from one forward pass each, in float32:
   the largest difference within a tolerance, the mean within a tenth of it. The weights are the very same as those that
   were measured in the exporting process (for ``merged/`` after rounding them), so next to nothing is allowed.
2. Greedy answers with nothing but the folder's ``generation_config.json``, in the dtype that it will be used in. They
   have to be equal token by token, except that two tokens whose log-probabilities are as near as rounding in that dtype
   moves them may change places; that is counted and printed.
3. The chat template of the folder makes the recorded prompt, the padding token is no stop token, and all stop tokens
   are in ``generation_config.json``.

For an adapter the base without it is measured too: it shows that the tolerance can tell the two apart. What rounding
itself costs, against the trained model, is no mistake and is reported; it judges only where an adapter was merged that
the comparison of tensors does not understand.
"""

import dataclasses
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from trainer.console import note, run_and_report, say, warn
from trainer.errors import RunError
from trainer.export.answers import (
    IN_16_BITS,
    ROUNDED,
    SAME_WEIGHTS,
    differences,
    differs,
    greedy_answer,
    judge,
)
from trainer.export.comparison import MEAN_SHARE, VERIFICATION, Comparison, Rounding, describe, rounding_price
from trainer.export.inference import (
    Inference,
    load_plain_tokenizer,
    read_inference,
    render_prompt,
    template_sha256,
)
from trainer.export.tensors import compare_tensors
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder, write_atomic
from trainer.plan import load_plan, stage_inputs
from trainer.samples import BaseModel, Prepared


def verify_adapter(
    folder: Path,
    base_directory: Path,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    added_tokens: Collection[int] = (),
) -> Comparison:
    """Load the base with plain transformers and ``folder`` onto it with plain peft, and compare.

    ``added_tokens``: ids that the base in ``base_directory`` is not to have; it gets room for them.

    Raises:
        TrainingFault: something differs.
        RunError: the folder cannot be read.
    """
    inference = read_inference(folder)
    check_serving_files(folder, inference)
    if (folder / "config.json").exists():
        raise differs(folder, "the adapter folder has a config.json", "transformers would take it for a whole model")
    base = _load_plain(base_directory, inference.dtype, device, trust_remote_code)
    _grow(base, added_tokens)
    with warnings.catch_warnings():  # peft asks transformers for a property under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = cast(PeftModel, PeftModel.from_pretrained(base, str(folder)).eval())
    _check_adapter_loaded(model, folder)
    answers = [greedy_answer(model, folder, golden, device) for golden in inference.golden]
    found = differences(model, inference, device)
    with model.disable_adapter():
        without = differences(model, inference, device)
    return judge("adapter", folder, inference, answers, found, tolerance=_tolerance(inference), without=without)


def verify_merged(folder: Path, device: torch.device, *, trust_remote_code: bool = False) -> Comparison:
    """Load ``folder`` with plain transformers, and compare.

    Raises:
        TrainingFault: something differs.
        RunError: the folder cannot be read.
    """
    inference = read_inference(folder)
    check_serving_files(folder, inference)
    model = _load_plain(folder, inference.dtype, device, trust_remote_code)
    answers = [greedy_answer(model, folder, golden, device) for golden in inference.golden]
    found = differences(model, inference, device)
    comparison = judge("merged", folder, inference, answers, found, tolerance=_tolerance(inference))
    return dataclasses.replace(comparison, rounding=inference.rounding)


def require_small_rounding(folder: Path, found: Rounding | None, inference: Inference) -> None:
    """Check by the trained model's answers what no comparison of tensors has proved: that its adapter was merged.

    Raises:
        TrainingFault: the merged model is further from the trained one than rounding has been seen to move it.
    """
    bounds = ROUNDED[inference.dtype] if inference.golden_dtype == "float32" else IN_16_BITS[inference.golden_dtype]
    if found is None or found.difference > bounds or found.mean > bounds * MEAN_SHARE:
        raise differs(
            folder,
            "no record of what rounding changed" if found is None else rounding_price(found),
            f"up to {bounds:g}, {bounds * MEAN_SHARE:g} on average, where tensors cannot be compared",
        )


def check_serving_files(folder: Path, inference: Inference) -> None:
    """Check stop tokens, padding token and chat template of an export folder.

    Raises:
        TrainingFault: one of them is not as recorded.
    """
    config = GenerationConfig.from_pretrained(str(folder))
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    lost = sorted(set(inference.stop_token_ids) - set(stops))
    if lost:
        raise differs(folder, f"stop tokens {lost} are not in generation_config.json ({stops})", "it would never stop")
    if inference.pad_token_id in stops or config.pad_token_id != inference.pad_token_id:
        raise differs(
            folder,
            f"padding token {config.pad_token_id}, stop tokens {stops}",
            f"recorded padding token {inference.pad_token_id}, which must not be a stop token",
        )
    tokenizer = load_plain_tokenizer(folder)
    if template_sha256(tokenizer) != inference.chat_template_sha256:
        raise differs(folder, "the chat template is another one", "the recorded hash of the template")
    probe = inference.template_probe
    if probe is not None and render_prompt(tokenizer, probe.turns) != probe.prompt_ids:
        raise differs(folder, "the chat template makes other tokens than in training", "the recorded prompt ids")


def verify_run(
    folder: RunFolder,
    *,
    base: BaseModel,
    adapter: bool,
    merged: bool,
    merged_from: Path | None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> list[Comparison]:
    """Verify the export folders that a run was asked for.

    ``merged_from``: folder of the adapter that was merged; None where all weights were trained.

    Raises:
        TrainingFault: an export does not answer like the trained model, or a merged tensor is not base plus adapter.
        RunError: a folder is missing or unreadable.
    """
    comparisons: list[Comparison] = []
    if adapter:
        found = _existing(folder.adapter)
        comparisons.append(
            verify_adapter(
                found,
                Path(base.published or base.directory),
                device,
                trust_remote_code=trust_remote_code,
                added_tokens=base.added_tokens,
            )
        )
    if merged:
        found, tensors = _existing(folder.merged), None
        if merged_from is not None:
            tensors = compare_tensors(
                found,
                Path(base.directory),
                _existing(merged_from),
                dtype=_DTYPES[read_inference(found).dtype],
                device=device,
                trust_remote_code=trust_remote_code,
            )
        comparison = verify_merged(found, device, trust_remote_code=trust_remote_code)
        if tensors is not None and tensors.not_compared:
            require_small_rounding(found, comparison.rounding, read_inference(found))
        comparisons.append(dataclasses.replace(comparison, tensors=tensors))
    return comparisons


def main(arguments: Sequence[str]) -> int:
    """Verify the run in the folder that is the only argument, and write its marker."""
    if len(arguments) != 1:
        raise RunError("one run folder is needed", got=" ".join(arguments), allowed="RUN_DIR")
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    folder = RunFolder(Path(arguments[0]))
    plan = load_plan(folder.plan_json.read_bytes())
    prepared = msgspec.json.decode(folder.prepared_json.read_bytes(), type=Prepared)
    torch.set_num_threads(plan.threads)
    lora, export = plan.config.method.name == "lora", plan.config.export
    comparisons = verify_run(
        folder,
        base=prepared.base,
        adapter=lora and export.adapter,
        merged=export.merged,
        merged_from=(folder.adapter if export.adapter else folder.merged_from) if lora else None,
        device=torch.device(plan.device),
        trust_remote_code=plan.config.model.trust_remote_code,
    )
    for comparison in comparisons:
        say(describe(comparison))
        if comparison.stopped == 0:
            warn(f"{comparison.name}: no golden answer ends with a stop token; all are cut off at task.max_new_tokens")
        if comparison.rounding is not None and comparison.rounding.is_large:
            warn(
                f"{comparison.name}: {rounding_price(comparison.rounding)}; the evaluation is the trained model's. "
                "Serve the adapter, or set model.dtype=float32, if that is too much"
            )
        if comparison.tensors is not None and comparison.tensors.not_compared:
            warn(f"{comparison.name}: only answers were compared, no tensors: {comparison.tensors.not_compared}")
        if comparison.base_difference is not None and not comparison.tells_apart:
            note("the base model alone lies within the tolerance: training changed too little for this check to see")
    encoded = msgspec.json.format(msgspec.json.encode(comparisons), indent=2)
    write_atomic(folder.export / VERIFICATION, encoded + b"\n")
    write_marker(
        folder,
        Marker(
            stage="verify",
            inputs=stage_inputs(plan, "verify"),
            seconds=time.monotonic() - started,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            summary=summary(comparisons),
        ),
    )
    return 0


def summary(comparisons: Sequence[Comparison]) -> dict[str, float | int | str]:
    """For the closing table: ``merged``: "8 of 8 answers equal, 272 tensors as merged"."""
    found: dict[str, float | int | str] = {}
    for one in comparisons:
        tensors = f", {one.tensors.compared} tensors as merged" if one.tensors and one.tensors.compared else ""
        found[one.name] = f"{one.equal} of {one.prompts} answers equal{tensors}"
    return found


def _tolerance(inference: Inference) -> float:
    return SAME_WEIGHTS if inference.golden_dtype == "float32" else IN_16_BITS[inference.golden_dtype]


def _load_plain(directory: Path, dtype: str, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    """A model as any reader would load it; every weight has to come from the files."""
    loaded, report = cast(
        tuple[PreTrainedModel, dict[str, Any]],
        AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        ),
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise differs(
            directory,
            f"missing {sorted(report['missing_keys'])[:3]}, other shapes {sorted(report['mismatched_keys'])[:3]}",
            "every weight of the model in the files",
        )
    return cast(PreTrainedModel, loaded.to(device).eval())  # pyright: ignore[reportArgumentType]


def _grow(model: PreTrainedModel, added: Collection[int]) -> None:
    """Give a base as published room for the tokens ``added``, as its readers do; the adapter brings their rows."""
    rows = max(added, default=-1) + 1
    if rows > cast(Any, model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _check_adapter_loaded(model: PeftModel, folder: Path) -> None:
    """peft only warns about adapter tensors that it could not place: compare what is in the model with the file."""
    there = cast(dict[str, torch.Tensor], get_peft_model_state_dict(model, save_embedding_layers=False))
    stored = load_file(folder / "adapter_model.safetensors")
    wrong = sorted(set(there) ^ set(stored))
    wrong += [name for name in stored if name in there and not torch.equal(there[name].cpu(), stored[name])]
    if wrong:
        raise differs(
            folder, f"{len(wrong)} adapter tensors did not arrive in the model, first {wrong[0]}", "all of them"
        )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise RunError(
            "there is no such export",
            where=str(folder),
            got="no folder",
            do="run `python -m trainer export` on this run",
        )
    return folder


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

if __name__ == "__main__":
    sys.exit(run_and_report(lambda: main(sys.argv[1:])))
