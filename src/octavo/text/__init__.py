"""Text in and out: tokenizers, chat templates, incremental detokenisation with stop strings.

Imports only `octavo.core`, the standard library and, inside functions, `tokenizers` and `jinja2`. What a model file
says about its vocabulary is passed in as a mapping, so nothing here knows how files are read.
"""
