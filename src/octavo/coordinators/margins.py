"""Writing in the Margins (Russak et al., 2024): a document read in segments, with a note in the margin of each.

One sequence, the trunk, reads the document. Behind each segment a fork of it asks for what helps to answer the
question, and writes it: a margin. Whether the margin is relevant is asked in a sequence of its own, without the
document. The trunk reads on meanwhile, all in one batch with whatever else runs: it waits for nobody. When it is at the
end and all margins are decided, a fork of it goes on with the margins that were kept and the question, and writes the
answer.

Questions about one document share its trunk, and are as independent of each other as requests: each draws with the same
streams as if it had been asked alone. What is done in which step may differ from run to run; what comes out does not.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from typing import Any

from octavo.coordinators.completion import Completion
from octavo.coordinators.verdict import merged_margin, verdict_of
from octavo.core.coordinator import Coordinator, NewSequence, SequenceResult
from octavo.core.errors import InvalidRequestError, RequestFailedError
from octavo.core.events import Reason
from octavo.core.margins import (
    AnswerBegun,
    AnswerDelta,
    AnswerNow,
    Judge,
    Margin,
    MarginDecided,
    MarginsEvent,
    MarginsOutput,
    MarginsSpec,
    MarginWritten,
    ReviewBegun,
    Segment,
    SegmentRead,
    StopReading,
)
from octavo.core.outputs import RequestMetrics
from octavo.core.prompts import filled
from octavo.core.protocols import Background, TextCodec
from octavo.core.request import RequestSpec
from octavo.core.sequence import Sequence
from octavo.core.want import Score

# Streams of draws: those of answers are a plain completion's, so that one is what `generate` gives for its prompt.
_ANSWER, _MARGIN, _VERDICT = (0,), 1, 2
_CHUNK_TOKENS = 128  # of the trunk in a step, while margins are written


def _copied(margin: Margin) -> Margin:
    return replace(margin, token_ids=list(margin.token_ids))


class _Note:
    """A margin under way: it is written in a fork of the trunk, and judged in a sequence of its own."""

    def __init__(self, question: int, segment: Segment) -> None:
        self.margin = Margin(question, segment, "", [])
        self.index = segment.index
        self.writing: Completion | None = None
        self.written = False
        self.judging: Completion | None = None  # by text
        self.sequence: Sequence | None = None  # of the one or the other
        self.dropped = False

    @property
    def decided(self) -> bool:
        return self.margin.kept is not None


class _Asked:
    """One question: its margins, and its answer."""

    def __init__(self, index: int, segments: SequenceOf[Segment]) -> None:
        self.index = index
        self.notes = [_Note(index, segment) for segment in segments]  # cut off where reading ends
        self.num_begun = 0  # margins
        self.num_settled = 0  # margins from the first on that are decided: rules look at them in this order
        self.num_kept = 0  # of these
        self.stopped = False  # by a person: margins that are not decided yet never are
        self.in_review = False
        self.joining = False  # from here on no verdict changes
        self.completion: Completion | None = None  # of the answer
        self.sequence: Sequence | None = None

        self.told = False  # all there is to tell, where no answer is wanted

    @property
    def finished(self) -> bool:
        return self.told or (self.completion is not None and self.completion.finish_reason is not None)


class MarginsCoordinator(Coordinator):
    """See the module."""

    def __init__(self, spec: MarginsSpec, codec: TextCodec | None, background: Background) -> None:
        super().__init__(spec.request_id, spec.priority, RequestMetrics(spec.arrival_time))
        if codec is None:
            raise ValueError("margins are text: they need a codec")
        self.spec = spec
        self.namespace = spec.namespace
        self._codec = codec
        self._background = background
        self._trunk: Sequence | None = None
        self._window = 0
        self._ends: list[int] = []  # where each segment ends in its trunk
        for count in spec.windows:
            window = spec.segments[len(self._ends) :][:count]
            self._ends += [len(spec.prefix) + one.last_token - window[0].first_token for one in window]
        self._asked = [_Asked(index, spec.segments) for index in range(len(spec.questions))]
        self._num_read = 0  # segments
        self._stopping = False  # somebody asked to read no further
        self._owners: dict[int, _Note | _Asked] = {}  # of branches, by sequence id
        self._order: dict[int, tuple[int, ...]] = {}  # of sequences, by id
        self._events: list[MarginsEvent] = []
        self._answered = False  # review is over
        self._num_jobs = 0  # under way beside the engine
        self._end: str | None = None
        self.error: str | None = None

    # --- what the scheduler reads ---

    @property
    def width(self) -> int:  # type: ignore[override]
        return max(1, sum(sequence.num_pending > 0 for sequence in self.sequences))

    @property
    def max_chunk_tokens(self) -> int | None:  # type: ignore[override]
        """While margins are written the trunk is read in small steps, in each of which they get a token. It costs
        nothing: a chunk of this size computes as many tokens a second as a large one."""
        return _CHUNK_TOKENS if any(isinstance(owner, _Note) for owner in self._owners.values()) else None

    @property
    def by_urgency(self) -> SequenceOf[Sequence]:
        """The trunk last, which takes all there is: what its forks have to read is short, and does not wait for it."""
        return sorted(self.sequences, key=lambda sequence: sequence is self._trunk)

    @property
    def keeps_idle(self) -> bool:  # type: ignore[override]
        """At the barrier the trunk waits for margins, and goes on by itself. Not while it waits for a person."""
        return not self._waits_for_person

    @property
    def _waits_for_person(self) -> bool:
        return (
            self.spec.review
            and not self._answered
            and not self._num_jobs
            and not any(sequence.num_pending for sequence in self.sequences)
        )

    # --- reading ---

    def start(self, new_sequence: NewSequence) -> None:
        self._new_sequence = new_sequence
        self._begin_window()
        self.go_on()  # a single token is read already

    def _begin_window(self) -> None:
        trunk = self._new_sequence(())
        self._trunk = trunk
        self._add(trunk, (-1,))
        first = self._num_read
        last = first + self.spec.windows[self._window]
        if not self.spec.overlap:
            last = first + 1
        trunk.extend([*self.spec.prefix, *self.spec.tokens_of(first, last)])

    def _add(self, sequence: Sequence, place: tuple[int, ...], owner: _Note | _Asked | None = None) -> None:
        """`place`: in the order of this request's sequences, of which the last give way first."""
        self._order[sequence.id] = place
        self.sequences.append(sequence)
        self.sequences.sort(key=lambda one: self._order[one.id])
        if owner is not None:
            self._owners[sequence.id] = owner

    def drop(self, sequence: Sequence) -> None:
        super().drop(sequence)
        self._owners.pop(sequence.id, None)
        self._order.pop(sequence.id, None)
        if sequence is self._trunk:
            self._trunk = None

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        for result in results:
            owner = self._owners.get(result.sequence.id)
            if isinstance(owner, _Asked):
                self._write_answer(owner, result)
            elif owner is not None:
                self._take(owner, result)
        self.go_on()

    def go_on(self) -> None:
        """Whatever can be done now: fork margins where the trunk is, decide whether to read on, answer."""
        if self._end is not None:
            return
        self._note_reading()
        if self._stopping and self._num_read:
            self._stopping = False
            self._stop_reading()
        for asked in self._asked:
            self._begin_margins(asked)
            self._settle(asked)
        self._go_on_reading()
        for asked in self._asked:
            if not asked.joining and self._may_answer(asked):
                self._join(asked)
        self._release_trunk()
        if all(asked.finished for asked in self._asked):
            last = self._asked[-1].completion
            self._end = "stop" if last is None else last.finish_reason

    def _note_reading(self) -> None:
        """Segments that the trunk has behind it; the last token's row is computed by whoever goes on from it."""
        trunk = self._trunk
        while trunk is not None and self._num_read < self._window_end:
            end = self._ends[self._num_read]
            if end > trunk.num_tokens or trunk.num_computed < end - 1:
                return
            segment = self.spec.segments[self._num_read]
            self._num_read += 1
            self._events.append(SegmentRead(segment, self._num_read, len(self.spec.segments)))

    @property
    def _window_end(self) -> int:
        """Segments up to the end of the window that is being read."""
        return sum(self.spec.windows[: self._window + 1])

    def _begin_margins(self, asked: _Asked) -> None:
        trunk = self._trunk
        while trunk is not None and not asked.stopped and asked.num_begun < min(self._num_read, len(asked.notes)):
            if sum(isinstance(owner, _Note) for owner in self._owners.values()) >= self.spec.max_branches:
                return
            note = asked.notes[asked.num_begun]
            asked.num_begun += 1
            branch = trunk.fork(self._ends[note.index], (_MARGIN, note.index))
            branch.extend(self.spec.questions[asked.index].extract[note.index])
            note.writing = self._completion(self.spec.margin, branch)
            self._work(note, branch, note.writing)

    def _completion(self, request: RequestSpec, sequence: Sequence) -> Completion:
        request = replace(request, prompt_token_ids=tuple(sequence.token_ids))
        return Completion(request, 0, self._codec, stream=sequence.stream)

    def _work(self, note: _Note, sequence: Sequence, completion: Completion | None) -> None:
        note.sequence = sequence
        self._add(sequence, (0, note.index, note.margin.question), note)
        if completion is not None:
            sequence.extend((), want=completion.want)
            completion.attach_to(sequence)

    def _go_on_reading(self) -> None:
        trunk = self._trunk
        if trunk is None:
            return
        reading = [asked for asked in self._asked if not asked.joining]
        begun_here = sum(self.spec.windows[: self._window])  # segments of earlier windows
        settled = all(asked.num_settled >= min(self._num_read, len(asked.notes)) for asked in reading)
        if self._num_read >= max((len(asked.notes) for asked in reading), default=0):
            if self._num_read == begun_here:  # nobody wants anything of this window
                self.drop(trunk)
            elif trunk.num_pending:  # nor of the rest
                trunk.truncate(self._ends[self._num_read - 1])
        elif self._num_read == self._window_end:
            begun = all(asked.num_begun >= min(self._num_read, len(asked.notes)) for asked in reading)
            if begun and (settled or self.spec.overlap):
                self.drop(trunk)
                self._window += 1
                self._begin_window()
        elif settled and not trunk.num_pending and self._num_read > begun_here:
            # Without overlap: else all of it is there, and this segment is not the last.
            assert trunk.num_tokens == self._ends[self._num_read - 1]
            trunk.extend(self.spec.tokens_of(self._num_read, self._num_read + 1))

    def _release_trunk(self) -> None:
        """Once nothing more goes on from it."""
        in_windows = len(self.spec.windows) > 1
        if self._trunk is not None and all(
            (asked.stopped or asked.num_begun == len(asked.notes))
            if in_windows
            else asked.told or asked.sequence is not None
            for asked in self._asked
        ):
            self.drop(self._trunk)

    # --- margins ---

    def _take(self, note: _Note, result: SequenceResult) -> None:
        if note.judging is not None:
            self._judge_by_text(note, result)
        elif not note.written:
            self._write(note, result)
        else:
            for row in result.rows:
                self._judge_by_score(note, row.scores)

    def _write(self, note: _Note, result: SequenceResult) -> None:
        writing = note.writing
        assert writing is not None and writing.text_stream is not None
        self.metrics.num_generated_tokens += writing.append_draws(result.draws, result.sequence)
        merged = self.spec.classification == "merged"
        if writing.finish_reason is None:
            if merged and verdict_of(writing.text_stream.text, final=False) is False:
                writing.finish("stop")  # whatever follows is not kept
            else:
                return
        self._put_away(note)
        note.writing, note.written = None, True  # it holds the whole prompt
        text = writing.text_stream.text
        margin = note.margin
        margin.token_ids, margin.finish_reason = list(writing.token_ids), writing.finish_reason
        margin.text = merged_margin(text) if merged else text.strip()
        self._events.append(MarginWritten(_copied(margin)))
        if merged:
            self._decide(note, verdict_of(text, final=True) is True and bool(margin.text), "model")
        elif not margin.text:
            self._decide(note, False, "nobody")
        else:
            question = self.spec.questions[margin.question]
            parts = "", margin.text, question.classify_after
            encode = partial(self._codec.encode_around, question.classify_before, *parts)
            self._submit(encode, partial(self._begin_judging, note))

    def _put_away(self, note: _Note) -> None:
        sequence, note.sequence = note.sequence, None
        if sequence is not None:
            self.drop(sequence)

    def _begin_judging(self, note: _Note, token_ids: list[int]) -> None:
        if note.dropped or note.decided:  # reading has ended before it, or a person was faster
            return
        sequence = self._new_sequence((_VERDICT, note.index))
        sequence.extend([*self.spec.questions[note.margin.question].classify_before, *token_ids])
        if self.spec.classification == "text":
            note.judging = self._completion(self.spec.verdict, sequence)
            self._work(note, sequence, note.judging)
        else:
            sequence.extend((), want=Score((self.spec.yes, self.spec.no)))
            self._work(note, sequence, None)

    def _judge_by_score(self, note: _Note, scores: tuple[float, ...]) -> None:
        yes, no = scores
        note.margin.score = yes - no
        self._put_away(note)
        self._decide(note, note.margin.score > self.spec.threshold, "model")

    def _judge_by_text(self, note: _Note, result: SequenceResult) -> None:
        judging = note.judging
        assert judging is not None and judging.text_stream is not None
        self.metrics.num_generated_tokens += judging.append_draws(result.draws, result.sequence)
        said = verdict_of(judging.text_stream.text, final=judging.finish_reason is not None)
        if said is None and judging.finish_reason is None:
            return
        self._put_away(note)
        note.judging = None
        self._decide(note, said is True, "model")

    def _decide(self, note: _Note, kept: bool, judged_by: str) -> None:
        margin = note.margin
        margin.kept, margin.judged_by = kept, judged_by
        notes = self._asked[margin.question].notes
        decided = sum(one.decided for one in notes)
        self._events.append(MarginDecided(_copied(margin), decided, len(self.spec.segments)))

    def _settle(self, asked: _Asked) -> None:
        """Look at verdicts in the order of the segments: a rule may say that this is as far as the document is read."""
        spec = self.spec
        while asked.num_settled < len(asked.notes) and asked.notes[asked.num_settled].decided:
            margin = asked.notes[asked.num_settled].margin
            asked.num_settled += 1
            asked.num_kept += bool(margin.kept)
            enough = spec.early_exit_kept is not None and asked.num_kept >= spec.early_exit_kept
            if spec.early_exit_score is not None and margin.score is not None and margin.judged_by == "model":
                enough = enough or margin.score >= spec.early_exit_score
            if enough:
                self._read_no_further(asked, asked.num_settled)

    def _read_no_further(self, asked: _Asked, num_segments: int) -> None:
        for note in asked.notes[num_segments:]:
            note.dropped = True
            self._put_away(note)
        del asked.notes[num_segments:]
        asked.num_begun = min(asked.num_begun, num_segments)

    # --- the answer ---

    def _may_answer(self, asked: _Asked) -> bool:
        if asked.num_settled < len(asked.notes) and not asked.stopped:
            return False
        if not self.spec.review or self._answered:
            return True
        if not asked.in_review:
            asked.in_review = True
            self._events.append(ReviewBegun(asked.index))
        return all(note.margin.judged_by in ("person", "nobody") for note in asked.notes if note.decided)

    def _join(self, asked: _Asked) -> None:
        """The barrier is passed: what comes behind the document is put together, beside the engine."""
        asked.joining = True
        if self.spec.answer is None:
            asked.told = True
            return
        question = self.spec.questions[asked.index]
        kept = [note for note in asked.notes if note.margin.kept]
        before: SequenceOf[int] = question.start or ()
        if question.start is None:
            assert self._trunk is not None
            before = self._trunk.token_ids[: self._ends[len(asked.notes) - 1]]
        parts = question.answer_without, "", ""
        if kept:
            parts = question.answer_before, "".join(map(self._joined, kept)), question.answer_after
        self._submit(partial(self._codec.encode_around, before, *parts), partial(self._begin_answer, asked))

    def _joined(self, note: _Note) -> str:
        before, after = self.spec.margin_before, self.spec.margin_after
        before, after = (filled(text, number=str(note.index + 1)) for text in (before, after))
        return before + note.margin.text + after

    def _begin_answer(self, asked: _Asked, token_ids: list[int]) -> None:
        spec, question = self.spec, self.spec.questions[asked.index]
        assert spec.answer is not None
        if question.start is None:
            assert self._trunk is not None
            sequence = self._trunk.fork(self._ends[len(asked.notes) - 1], _ANSWER)
        else:
            sequence = self._new_sequence(_ANSWER)
            sequence.extend(question.start)
        sequence.extend(token_ids)
        room = spec.answer.max_tokens - sequence.num_tokens
        if room < 1:
            sequence.drop()
            kept = sum(bool(note.margin.kept) for note in asked.notes)
            raise RequestFailedError(
                f"the final prompt with {kept} margins has {sequence.num_tokens} tokens: with "
                f"max_model_len={spec.answer.max_tokens} no room is left for an answer"
            )
        request = replace(
            spec.answer, max_tokens=room if spec.max_answer_tokens is None else min(room, spec.max_answer_tokens)
        )
        completion = asked.completion = self._completion(request, sequence)
        asked.sequence = sequence
        num_segments = len(asked.notes) if question.start is None else 0
        self._events.append(AnswerBegun(asked.index, completion.request.prompt_token_ids, num_segments))
        self._add(sequence, (1, asked.index), asked)
        sequence.extend((), want=completion.want)
        completion.attach_to(sequence)
        self._release_trunk()

    def _write_answer(self, asked: _Asked, result: SequenceResult) -> None:
        completion = asked.completion
        assert completion is not None
        self.metrics.num_generated_tokens += completion.append_draws(result.draws, result.sequence)
        if completion.finish_reason is not None:
            self.drop(result.sequence)

    # --- beside the engine ---

    def _submit(self, job: Any, done: Any) -> None:
        self._num_jobs += 1

        def take(answer: list[int] | Exception) -> None:
            self._num_jobs -= 1
            if self._end is not None:
                return
            if isinstance(answer, Exception):
                raise answer
            done(answer)
            self.go_on()

        self._background.submit(self.request_id, job, take)

    # --- what is asked of it ---

    def call(self, call: Any) -> None:
        match call:
            case Judge(question, segment, keep, text):
                self._judge(question, segment, keep, text)
            case AnswerNow():
                if not self.spec.review:
                    raise InvalidRequestError("review", "was not asked for: the answer comes by itself")
                self._answered = True
            case StopReading():
                self._stopping = True
            case _:
                super().call(call)

    def _judge(self, question: int, segment: int, keep: bool, text: str | None) -> None:
        asked = self._asked[question]
        if asked.joining:
            raise InvalidRequestError("segment", "its margin stands already in the prompt of the answer")
        if segment >= len(asked.notes):
            raise InvalidRequestError("segment", f"{segment} is not read for this question: it has ended before")
        note = asked.notes[segment]
        if note.dropped or not note.written:
            raise InvalidRequestError("segment", f"the margin of {segment} is not written")
        if keep and not (text or note.margin.text):
            raise InvalidRequestError("segment", f"the margin of {segment} is empty: give it a text")
        most, others = self.spec.early_exit_kept, sum(bool(one.margin.kept) for one in asked.notes if one is not note)
        if keep and most is not None and others >= most:
            raise InvalidRequestError("segment", f"{others} margins are kept: early_exit_kept={most} allows no more")
        if segment < asked.num_settled:
            asked.num_kept += keep - bool(note.margin.kept)
        if text is not None:
            note.margin.text = text
        self._put_away(note)
        note.judging = None
        self._decide(note, keep, "person")
        if asked.num_kept == most:
            self._read_no_further(asked, asked.num_settled)

    def _stop_reading(self) -> None:
        """What is read stays; margins that are not decided go."""
        for asked in self._asked:
            if not asked.joining:
                asked.stopped = True
                self._read_no_further(asked, self._num_read)
                for note in asked.notes:
                    if not note.decided:
                        note.dropped = True
                        self._put_away(note)

    # --- ending ---

    def finish(self, reason: str, error: str | None = None) -> None:
        self._end, self.error = reason, error
        for asked in self._asked:
            if asked.completion is not None:
                asked.completion.finish(reason)

    @property
    def finished(self) -> bool:
        return self._end is not None

    @property
    def end_reason(self) -> Reason:
        return Reason(self._end or "")

    def take_output(self, now: float) -> MarginsOutput | None:  # type: ignore[override]
        if self.metrics.first_token_time is None and any(
            asked.completion is not None and asked.completion.token_ids for asked in self._asked
        ):
            self.metrics.first_token_time = now
        for asked in self._asked:
            if asked.completion is not None and asked.completion.is_new:
                self._events.append(AnswerDelta(asked.index, asked.completion.output()))
        if not self._events and not self.finished:
            return None
        events, self._events = self._events, []
        return MarginsOutput(self.request_id, events, self.finished, self.error, replace(self.metrics))
