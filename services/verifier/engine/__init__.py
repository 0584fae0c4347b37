"""The verifier's engine: vLLM with sessions that park between blocks, and early exits that speak in mid-pass.

An out-of-tree plugin of vLLM 0.32.0 (entry point `vllm.general_plugins`), never an edited copy. In reading order:
`types` (what the verifier sees), `engine` (`VllmEngine`, the face over AsyncLLM), `launch` (how the engine process is
started), `scheduler` (a session is one long request that parks), `model`, `exits` and `worker` (early exits; which they
are is said in `exit_choice`, `exit_files`, `exit_modules` and `exit_head`), `draft_head` and `floor_head` (what drafts for
sessions that go on by themselves), `channel` (the exits' way out), `compat` (what of vLLM all this relies on).

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations


def register() -> None:
    """Entry point: teach vLLM our models and the calls that reach our scheduler. Harmless to other users of vLLM.

    vLLM calls it in every process that it starts.
    """
    from services.verifier.engine import plugin

    plugin.register()
