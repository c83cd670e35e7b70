"""Scores pictures of subjects by the field's protocol, whichever method drew them."""
