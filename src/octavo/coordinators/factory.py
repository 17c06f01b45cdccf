"""From a request to what runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.coordinators.single import SingleCoordinator
from octavo.core.coordinator import Coordinator
from octavo.core.protocols import Background, TextCodec
from octavo.core.request import RequestSpec, SessionSpec

if TYPE_CHECKING:
    from octavo.core.margins import MarginsSpec
    from octavo.core.pooling import PoolingSpec


def make_coordinator(
    spec: RequestSpec | SessionSpec | MarginsSpec | PoolingSpec, codec: TextCodec | None, background: Background
) -> Coordinator:
    """`codec` makes text; None: none is made."""
    # The kinds that are rarer are imported when they are asked for: start-up is short without them.
    if isinstance(spec, SessionSpec):
        from octavo.coordinators.branches import SessionCoordinator

        return SessionCoordinator(spec, codec)
    if not isinstance(spec, RequestSpec):
        from octavo.core.pooling import PoolingSpec

        if isinstance(spec, PoolingSpec):
            from octavo.coordinators.pooling import PoolingCoordinator

            return PoolingCoordinator(spec)
        from octavo.coordinators.margins import MarginsCoordinator

        return MarginsCoordinator(spec, codec, background)
    if spec.beams is not None:
        from octavo.coordinators.beams import BeamCoordinator

        return BeamCoordinator(spec, codec)
    if spec.params.n > 1:
        from octavo.coordinators.samples import SamplesCoordinator

        return SamplesCoordinator(spec, codec)
    return SingleCoordinator(spec, codec)
