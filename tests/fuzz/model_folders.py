"""Hugging Face folders with something wrong in them, from the files to the answer; see `whole_models`."""

from tests.fuzz.whole_models import check_folder as check
from tests.fuzz.whole_models import make_folder as make

__all__ = ["check", "make"]
