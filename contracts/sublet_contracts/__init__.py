"""The documents and the wire protocol that every part of sublet shares; imports nothing of ours."""
