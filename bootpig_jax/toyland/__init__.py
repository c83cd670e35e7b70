"""Toyland: a small drawn world in which "did the subject carry over?" can be measured.

`world` says what exists and what a caption may say, `render` draws it, and `measures` scores
pictures with a fixed image descriptor.
"""
