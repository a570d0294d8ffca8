"""``AutoTokenizer`` of ``model_type: florence_fast``; see transformers_registry.py."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from florence_fast.data.tokenizer import END, START, Tokenizer, byte_pairs


class FlorenceFastTokenizer(PreTrainedTokenizer):
    """`florence_fast.data.Tokenizer` with transformers' surface; rows are filled with end-of-text, as CLIP's are there.

    The vocabulary comes with florence_fast, so that nothing is written but the settings.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers' own form
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 - transformers' own form

    def __init__(self, model_max_length: int = 77, **kwargs: Any) -> None:
        self._ours = Tokenizer(model_max_length)
        self._ids = byte_pairs().get_vocab()
        self._tokens = {number: token for token, number in self._ids.items()}
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        super().__init__(model_max_length=model_max_length, **{**special, **kwargs})

    @property
    def vocab_size(self) -> int:
        """49,408."""
        return self._ours.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[number] for number in self._ours.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ours.eot_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to the text that they stand for; case and spacing stay normalised."""
        return self._ours.decode([self._ids[token] for token in tokens if token not in (START, END)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put start-of-text before the ids and end-of-text behind them."""
        return [self._ours.sot_token_id, *token_ids_0, *(token_ids_1 or []), self._ours.eot_token_id]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing."""
        return ()
