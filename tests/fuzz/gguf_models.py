"""GGUF files with something wrong in them, from the file to the answer; see `whole_models`."""

from tests.fuzz.whole_models import check_gguf as check
from tests.fuzz.whole_models import make_gguf as make

__all__ = ["check", "make"]
