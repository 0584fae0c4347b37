"""Answers that have to be JSON: grammars for vLLM's structured outputs, made where vLLM would not make them.

vLLM compiles a schema for requests that its front-end has checked with a tokenizer. This engine starts without one, and
an answer may have been begun in another engine; so the scheduler compiles, with a tokenizer loaded for the first schema,
and leads the grammar over what is committed. From there on it is vLLM's own machinery: it masks each verified row by what
the grammar allows after the block's earlier tokens, and follows what was said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

ANY_OBJECT = '{"type": "object"}'


def as_schema(json_schema: str) -> str:
    """The schema that `GenerationParams.json_schema` asks for; `InvalidRequest` when no grammar can be made of it."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        asked = json.loads(json_schema)
    except ValueError as error:
        raise InvalidRequest(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(asked, dict):
        raise InvalidRequest(f"the JSON schema is {type(asked).__name__}; it should be an object")
    schema = json.dumps(asked) if asked else ANY_OBJECT
    try:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)))
    except (ValueError, VLLMValidationError) as error:
        raise InvalidRequest(f"no grammar can be made of the JSON schema: {error}") from None
    return schema


class Grammars:
    """Makes grammars beside the scheduler, one at a time."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self._manager = manager
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def begin(self, request: Request, schema: str, committed: Sequence[int]) -> None:
        """Have the request's answer, of which `committed` was said elsewhere, satisfy `schema`.

        It waits in the scheduler until the grammar is there; what goes wrong with that ends the request.
        """
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.request import RequestStatus
        from vllm.v1.structured_output.request import StructuredOutputRequest

        asked = StructuredOutputRequest(params=StructuredOutputsParams(json=schema))
        asked.grammar = self._thread.submit(self._make, request, schema, list(committed))
        request.structured_output_request = asked
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    def allowed(self, request: Request, tokens: list[int]) -> list[int]:
        """Those first `tokens` that the grammar allows; the target can't accept more."""
        found: list[int] = self._manager.validate_tokens(request, tokens)
        return found

    def _make(self, request: Request, schema: str, committed: list[int]) -> StructuredOutputGrammar:
        from vllm.v1.structured_output.backend_types import StructuredOutputOptions

        backend = self._backend()
        grammar: StructuredOutputGrammar = backend.compile_grammar(
            StructuredOutputOptions.JSON, schema, stop_token_ids=request.sampling_params.all_stop_token_ids
        )
        if not grammar.accept_tokens(request.request_id, committed):
            raise ValueError("what is committed of the answer does not satisfy its JSON schema")
        return grammar

    def _backend(self) -> Any:
        """vLLM's, made for the first grammar: a tokenizer takes a second, and most engines need none."""
        from vllm.tokenizers.registry import get_tokenizer
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

        manager = self._manager
        if manager.backend is None:
            model = manager.vllm_config.model_config
            manager.backend = XgrammarBackend(
                manager.vllm_config,
                tokenizer=get_tokenizer(model.tokenizer, tokenizer_mode=model.tokenizer_mode),
                vocab_size=model.get_vocab_size(),
            )
        return manager.backend
