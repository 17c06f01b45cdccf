"""The engine: scheduler, steps, preemption and errors, on ints. It is handed its executor and its text codec."""

from octavo.engine.engine import Engine
from octavo.engine.loop import EngineLoop
from octavo.engine.scheduler import Scheduler, SchedulerConfig

__all__ = ["Engine", "EngineLoop", "Scheduler", "SchedulerConfig"]
