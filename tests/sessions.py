"""What lies behind a session that a user holds."""

from __future__ import annotations

from typing import Any

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.coordinators.branches import BranchState, SessionCoordinator
from octavo.coordinators.completion import Completion
from octavo.coordinators.factory import make_coordinator
from octavo.session import BaseBranch


def coordinator_of(branch: BaseBranch) -> SessionCoordinator:
    client = branch._client
    found = client.loop.engine._coordinators[client.spec.request_id]
    assert isinstance(found, SessionCoordinator)
    return found


def state_of(branch: BaseBranch) -> BranchState:
    """The engine's side of a branch."""
    return coordinator_of(branch)._branches[branch._branch]


def run_as(
    llm: LLM, token_ids: list[int], params: SamplingParams, *, index: int = 0, stream: tuple[int, ...] = ()
) -> RequestOutput:
    """A plain request for one output that draws as output `index` of another would, or from any stream."""
    request = llm._frontend.make({"prompt_token_ids": token_ids}, params.but(n=1, output_kind="final_only"))

    def make(spec: Any, codec: Any, background: Any) -> Any:
        coordinator = make_coordinator(spec, codec, background)
        if spec.request_id == request.spec.request_id:
            coordinator.completions = [Completion(spec, index, codec, stream=stream)]  # type: ignore[attr-defined]
        return coordinator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.engine.engine.make_coordinator", make)
        (output,) = llm._run([request], False)
    return output
