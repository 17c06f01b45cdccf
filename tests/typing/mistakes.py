"""Mistakes of a user. It is never run: mypy finds every one, or tells that it has nothing to ignore."""

from __future__ import annotations

import octavo

llm = octavo.LLM("x")
llm.generate(5)  # type: ignore[arg-type]
llm.genarate("x")  # type: ignore[attr-defined]
octavo.SamplingParams(tempurature=1)  # type: ignore[call-arg]
octavo.SamplingParams(output_kind="deltas")  # type: ignore[arg-type]
octavo.Nonsense  # type: ignore[attr-defined] # noqa: B018
number: int = llm.generate("a")[0].outputs[0].text  # type: ignore[assignment]
llm.session().select(["x"]).best.logprob  # type: ignore[attr-defined] # noqa: B018
