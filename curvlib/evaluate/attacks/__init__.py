"""Attacks on refusals, each beside a control that does something; nothing that they make is written to disk."""
