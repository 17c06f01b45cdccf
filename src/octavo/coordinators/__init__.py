"""Coordinators: each owns the sequences of one request and says after every step what each does next."""

from octavo.coordinators.beams import BeamCoordinator
from octavo.coordinators.completion import CompletionRequest
from octavo.coordinators.samples import SamplesCoordinator
from octavo.coordinators.session import SessionCoordinator
from octavo.coordinators.single import SingleCoordinator

__all__ = ["BeamCoordinator", "CompletionRequest", "SamplesCoordinator", "SessionCoordinator", "SingleCoordinator"]
