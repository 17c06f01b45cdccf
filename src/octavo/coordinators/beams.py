"""Beam search: all beams run in every step, over shared blocks. A beam that goes on keeps its sequence; one that goes
on twice is forked, which shares its blocks; KV is never moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from octavo.coordinators.beam_group import BeamGroup, Candidate, Finished, Row, float32
from octavo.coordinators.completion import Sent, draw_of, grammar_state, text_stream, to_dict
from octavo.coordinators.generating import RequestCoordinator
from octavo.core.coordinator import NewSequence, SequenceResult
from octavo.core.grammar import GrammarState
from octavo.core.outputs import CompletionOutput, Logprob, RequestOutput
from octavo.core.params import OutputKind
from octavo.core.plan import RowResult, TokenLogprobs
from octavo.core.protocols import TextCodec, TextStream
from octavo.core.repetition import repeats
from octavo.core.request import RequestSpec
from octavo.core.sequence import Sequence
from octavo.core.token_counts import TokenCounts
from octavo.core.want import TopK


def least_blocks(request: RequestSpec, block_size: int) -> int:
    """KV blocks that a search takes at the length asked for, or, if none was, of two tokens: beams can share all blocks
    but the last, which no two of them have in common."""
    assert request.beams is not None
    asked = request.max_tokens if request.beams.max_tokens is not None else min(request.max_tokens, 2)
    longest = len(request.prompt_token_ids) + asked - 1
    return -(-longest // block_size) + (request.beams.width - 1 if asked > 1 else 0)


@dataclass(slots=True)
class _Chain:
    """Log-probabilities of a beam's tokens, last first: beams share what they have in common."""

    entry: TokenLogprobs
    before: _Chain | None


@dataclass(slots=True)
class _Beam:
    sequence: Sequence
    logprobs: _Chain | None = None


@dataclass(slots=True)
class _Hypothesis:
    token_ids: list[int]
    logprobs: _Chain | None
    finish_reason: str
    stop_reason: int | str | None = None


@dataclass(slots=True)
class _Group:
    search: BeamGroup[_Hypothesis]
    beams: list[_Beam] = field(default_factory=list)


class BeamCoordinator(RequestCoordinator):
    """One prompt's search. See BeamSearchParams for what the settings mean."""

    lockstep = True

    def __init__(self, request: RequestSpec, codec: TextCodec | None = None) -> None:
        if request.beams is None:
            raise ValueError("a search needs BeamSearchParams")
        super().__init__(request, codec)
        self.params = params = request.beams
        self._text_type: type[TextStream] | None = None  # of the streams attached to beams, which look for stop strings
        # While streaming: what all outputs that are still possible begin with.
        self._common: list[int] = []
        self._common_text = self._text_stream() if params.output_kind is not OutputKind.FINAL_ONLY else None
        self._sent = Sent()
        size = params.width // params.num_beam_groups
        ends = len(request.end_token_ids)
        early = params.early_stopping if params.width > 1 else True  # one beam is greedy decoding, whatever is set
        self._groups = [
            _Group(BeamGroup(size, ends, params.length_penalty, early, request.max_tokens))
            for _ in range(params.num_beam_groups)
        ]

    @property
    def width(self) -> int:  # type: ignore[override]
        return sum(group.search.width for group in self._groups if not group.search.ended)

    def least_blocks(self, block_size: int) -> int:
        return least_blocks(self.request, block_size)

    def start(self, new_sequence: NewSequence) -> None:
        prompt = new_sequence(())
        self.sequences.append(prompt)
        for group in self._groups:
            group.beams = [_Beam(prompt)]
        prompt.extend(self.request.prompt_token_ids, want=self._want())
        if self.request.params.has_penalties:
            prompt.attach(TokenCounts(self.request.prompt_token_ids))
        if (grammar := grammar_state(self.request, self.codec)) is not None:
            prompt.attach(grammar)
        if self.request.params.stop and (text := self._text_stream()) is not None:
            self._text_type = type(text)
            prompt.attach(text)

    def _want(self) -> TopK:
        params = self.params
        draw = draw_of(self.request, (), params.no_repeat_ngram_size)  # nothing is drawn: the processors alone matter
        # A group's penalties lower at most as many tokens of a row as earlier groups have beams: with so many more,
        # none that would be among the best after the penalty is missed.
        search = self._groups[0].search
        extra = params.width - search.width if params.diversity_penalty else 0
        return TopK(search.num_candidates + extra, draw, params.logprobs)

    def _text_stream(self) -> TextStream | None:
        return text_stream(self.request, self.codec)

    # --- a step ---

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        answers = {result.sequence.id: row for result in results for row in result.rows if row.candidates}
        if not answers:
            return  # part of the prompt, or of what is restored
        if (problem := self._grammar_problem()) is not None:
            self.finish("error", problem)
            return
        chosen: Counter[int] = Counter()  # tokens that earlier groups took in this step
        moves: list[tuple[_Group, _Beam, Candidate]] = []
        for group in self._groups:
            if not group.search.ended:
                candidates = self._step(group, answers, chosen)
                chosen.update(candidate.token_id for candidate in candidates)
                moves += [(group, group.beams[candidate.beam], candidate) for candidate in candidates]
        if not moves and not self._best():
            ruled_out = (
                "structured_outputs, allowed_token_ids, bad_words, min_tokens, logit_bias and no_repeat_ngram_size"
            )
            self.finish("error", f"no beam can go on: the request's {ruled_out} together rule out the whole vocabulary")
            return
        self._move(moves, answers)
        if not moves:
            self._end = self._best()[0].hypothesis.finish_reason

    def _grammar_problem(self) -> str | None:
        """Of beams whose grammar met a limit. Without them the best might be missed, and look as if it were found."""
        beams = [beam for group in self._groups if not group.search.ended for beam in group.beams]
        states = [beam.sequence.attached(GrammarState) for beam in beams]
        errors = [state.error for state in states if state is not None and state.error is not None]
        if not errors:
            return None
        who = "no beam can" if len(errors) == len(beams) else f"{len(errors)} of {len(beams)} beams cannot"
        return f"{who} go on: structured_outputs: {errors[0]}"

    def _step(self, group: _Group, answers: dict[int, RowResult], chosen: Counter[int]) -> list[Candidate]:
        """One step of a group: the candidates that become its beams."""
        rows = [self._row(answers[beam.sequence.id].candidates, chosen) for beam in group.beams]
        ranked = group.search.rank(rows)
        hypotheses = {}
        for index, candidate in enumerate(ranked):
            beam = group.beams[candidate.beam]
            end = self._end_of(beam, candidate.token_id, group.search.length + 1)
            candidate.hit = end is not None
            if end is not None and index < group.search.width:
                token_ids = [*self._generated(beam.sequence), candidate.token_id]
                hypotheses[index] = _Hypothesis(token_ids, self._chain(beam, candidate, answers), *end)
        return group.search.advance(ranked, hypotheses)

    def _row(self, candidates: Row, chosen: Counter[int]) -> Row:
        """A beam's continuations after the penalty for what earlier groups chose."""
        penalty = self.params.diversity_penalty
        if not penalty or not chosen:
            return candidates
        lowered = [(token_id, float32(logprob - penalty * chosen[token_id])) for token_id, logprob in candidates]
        return sorted(lowered, key=lambda candidate: (-candidate[1], candidate[0]))

    def _end_of(self, beam: _Beam, token_id: int, length: int) -> tuple[str, int | str | None] | None:
        """Finish reason and stop reason, if a hypothesis ends with this token."""
        if token_id in self.request.end_token_ids:
            return "stop", None if token_id in self.request.eos_token_ids else token_id
        text = None if self._text_type is None else beam.sequence.attached(self._text_type)
        if text is not None:
            text = text.fork()
            text.advance((token_id,))
            if text.stop_reason is not None:
                return "stop", text.stop_reason
        if not self.request.eos_token_ids and (grammar := beam.sequence.attached(GrammarState)) is not None:
            grammar = grammar.fork()  # no end token can follow: it ends where nothing can
            grammar.advance((token_id,))
            if grammar.is_complete:
                return "stop", None
        if length >= self.request.max_tokens:
            return "length", None
        repetition = self.request.params.repetition
        if repetition is not None and length >= self.params.min_tokens:
            token_ids = beam.sequence.token_ids
            # The end of the output that a pattern of any size may reach over, and not all of it: beams are many.
            reach = min(repetition.max_pattern_size * repetition.min_count, length) - 1
            if repeats([*token_ids[len(token_ids) - reach :], token_id], repetition):
                return "repetition", "repetition_detected"
        return None

    def _chain(self, beam: _Beam, candidate: Candidate, answers: dict[int, RowResult]) -> _Chain | None:
        if self.params.logprobs is None:
            return None
        answer = answers[beam.sequence.id]
        place = next(i for i, (token_id, _) in enumerate(answer.candidates) if token_id == candidate.token_id)
        return _Chain(answer.candidate_logprobs[place], beam.logprobs)

    def _generated(self, sequence: Sequence) -> list[int]:
        return sequence.token_ids[len(self.request.prompt_token_ids) :]

    def _move(self, moves: list[tuple[_Group, _Beam, Candidate]], answers: dict[int, RowResult]) -> None:
        """Let the sequences be those of the new beams, in order. All forks are made before anything is appended."""
        for group in self._groups:
            group.beams = []
        kept: set[int] = set()
        for group, beam, candidate in moves:
            sequence = beam.sequence
            if sequence.id in kept:
                sequence = sequence.fork(sequence.num_tokens, ())
            kept.add(sequence.id)
            group.beams.append(_Beam(sequence, self._chain(beam, candidate, answers)))
        for sequence in self.sequences:
            if sequence.id not in kept:
                sequence.drop()
        self.sequences[:] = [beam.sequence for group in self._groups for beam in group.beams]
        for sequence, (_, _, candidate) in zip(self.sequences, moves, strict=True):
            sequence.extend((candidate.token_id,), want=self._want())
        self.metrics.num_generated_tokens += self.params.num_outputs

    # --- ending, and what the user sees ---

    def finish(self, reason: str, error: str | None = None) -> None:
        if self._end is not None:
            return
        self.error = error
        self._end = reason
        for group in self._groups:  # the answer so far: what is finished and what runs, all of it cut short
            for finished in group.search.finished:
                finished.hypothesis.finish_reason, finished.hypothesis.stop_reason = reason, None
            # A group that has ended has no beams.
            for beam, score in zip(group.beams, group.search.scores, strict=False):
                if token_ids := self._generated(beam.sequence):
                    normalised = group.search.normalised(score, len(token_ids))
                    hypothesis = _Hypothesis(token_ids, beam.logprobs, reason)
                    group.search.finished.append(Finished(normalised, score, hypothesis))

    @property
    def finished(self) -> bool:
        return self._end is not None

    def _best(self) -> list[Finished[_Hypothesis]]:
        """Finished hypotheses of all groups, as many as are asked for, best first."""
        pooled = [finished for group in self._groups for finished in group.search.finished]
        return sorted(pooled, key=lambda finished: -finished.score)[: self.params.num_outputs]

    def take_output(self, now: float) -> RequestOutput | None:
        self._note_first_token(now)
        kind = OutputKind(self.params.output_kind)
        if self.finished:
            outputs = [self._hypothesis_output(index, finished) for index, finished in enumerate(self._best())]
            if not outputs:
                outputs = [CompletionOutput(0, "", [], finish_reason=self._end)]
            self.metrics.num_generated_tokens = sum(len(output.token_ids) for output in outputs)
            if self._sent.tokens:  # the rest of what is known to be the beginning of all
                best = outputs[0]
                best.text = best.text[self._sent.chars :]
                best.token_ids = best.token_ids[self._sent.tokens :]
                best.logprobs = None if best.logprobs is None else best.logprobs[self._sent.tokens :]
        else:
            if kind is OutputKind.FINAL_ONLY or not self._grow_common():
                return None
            outputs = [self._common_output()]
        return self._output(outputs)

    def _grow_common(self) -> bool:
        """Whether the tokens that all possible outputs begin with have become more. What is shown is never taken back:
        every later hypothesis goes on from a running beam."""
        skipped = len(self.request.prompt_token_ids)
        rows = [(beam.sequence.token_ids, skipped) for group in self._groups for beam in group.beams]
        rows += [(finished.hypothesis.token_ids, 0) for finished in self._best()]
        added: list[int] = []
        while True:
            at = len(self._common) + len(added)
            tokens = {ids[first + at] if first + at < len(ids) else None for ids, first in rows}
            if len(tokens) != 1 or (token_id := tokens.pop()) is None:
                break
            added.append(token_id)
        self._common += added
        if self._common_text is not None:
            self._common_text.advance(added)
        return bool(added)

    def _common_output(self) -> CompletionOutput:
        first = self._sent
        text = "" if self._common_text is None else self._common_text.text_after(first.chars)
        output = CompletionOutput(0, text, self._common[first.tokens :])
        if self.params.logprobs is not None:
            beam = next(beam for group in self._groups for beam in group.beams)  # it begins with the common tokens
            new = beam.sequence.num_tokens - len(self.request.prompt_token_ids) - first.tokens
            output.logprobs = _unrolled(beam.logprobs, new)[: len(output.token_ids)]
        self._sent = Sent(len(self._common), first.chars + len(text))
        return output

    def _hypothesis_output(self, index: int, finished: Finished[_Hypothesis]) -> CompletionOutput:
        hypothesis = finished.hypothesis
        stream, text = self._text_stream(), ""
        if stream is not None:
            # An end token is part of token_ids, and of the text only when the user wants to see it.
            ended = hypothesis.token_ids[-1] in self.request.end_token_ids
            hidden = ended and not self.params.include_stop_str_in_output
            stream.advance(hypothesis.token_ids[:-1] if hidden else hypothesis.token_ids)
            stream.finish()
            text = stream.text
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=hypothesis.token_ids,
            cumulative_logprob=finished.sum,
            logprobs=None if self.params.logprobs is None else _unrolled(hypothesis.logprobs),
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
            score=finished.score,
        )


def _unrolled(chain: _Chain | None, most: int | None = None) -> list[dict[int, Logprob]]:
    """The entries of a chain, first token first; with `most`, only so many last ones."""
    entries: list[dict[int, Logprob]] = []
    while chain is not None and len(entries) != most:
        entries.append(to_dict(chain.entry))
        chain = chain.before
    return entries[::-1]
