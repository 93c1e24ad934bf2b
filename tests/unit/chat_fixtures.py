"""Small tokenizers and conversations for the tests of formats, templates, chat and length."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.samples import Conversation, Message, Origin, Record

TEXT = "The buyer must pay the seller within thirty days and keep every price secret. What is this clause? payment"
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# What SmolLM2-Instruct comes with: no {% generation %}, a system prompt of its own.
UNMARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(
    specials: Sequence[str] = CHATML_TOKENS, *, eos: str = "<|im_end|>", pad: str | None = "<|im_end|>", bos: str = ""
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text, and joined strings are joined tokens. It pads with its stop token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [TEXT, "the\n\n\n\nbuyer\n\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    given = {"eos_token": eos, "pad_token": pad, "bos_token": bos or None}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{name: token for name, token in given.items() if token})


def sentence_piece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before the first word of a string, as those of Llama 2 and Mistral do."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def row(number: int, *turns: tuple[str, str], **more: object) -> Conversation:
    """A conversation of (role, content) turns from line ``number`` of rows.jsonl."""
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Conversation(id=str(number), origin=Origin("rows.jsonl", number), messages=messages, **more)  # type: ignore[arg-type]


def text_row(number: int, text: str) -> Conversation:
    """A plain text from line ``number`` of rows.jsonl."""
    return Conversation(id=str(number), origin=Origin("rows.jsonl", number), text=text)


def records(*fields: Mapping[str, object], file: str = "rows.jsonl") -> list[Record]:
    """Records of consecutive lines of ``file``."""
    return [Record(entry, Origin(file, number)) for number, entry in enumerate(fields, start=1)]
